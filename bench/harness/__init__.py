"""How one case is measured: compared with float64, timed, written as JSON."""
