"""Token clustering and reconstruction for plain ViTs (arXiv 2210.01035)."""
