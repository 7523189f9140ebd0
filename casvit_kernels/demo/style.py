"""The report's style sheet: light and dark, on screen and on paper."""

STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #1c1e21; --muted: #5f656d;
  --line: #dcdee1; --accent: #c2410c; --plain: #a9b4c2; --note: #fff6e5; --note-line: #e0a63c; }
@media (prefers-color-scheme: dark) { :root { --paper: #15171a; --ink: #e8e9eb; --muted: #9aa1a9;
  --line: #33373d; --accent: #fb8b4b; --plain: #566375; --note: #2b2415; --note-line: #8a6a26; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 3rem 1.5rem 2rem; }
h1 { font-size: 2.1rem; line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 1rem; }
h2 { font-size: 1.35rem; letter-spacing: -0.01em; margin: 0 0 0.6rem; }
h3 { font-size: 1rem; margin: 1.8rem 0 0.4rem; }
p { max-width: 46rem; margin: 0 0 1rem; }
.kicker { color: var(--accent); font-weight: 600; margin: 0 0 0.4rem; }
.lead { font-size: 1.15rem; max-width: 50rem; }
.note { background: var(--note); border-left: 3px solid var(--note-line); padding: 0.6rem 0.9rem;
  font-size: 0.95rem; }
section { border-top: 1px solid var(--line); padding: 2rem 0 1rem; margin-top: 1.5rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 1px;
  background: var(--line); border: 1px solid var(--line); margin: 1.8rem 0 0; }
.figures div { background: var(--paper); padding: 0.9rem 1rem; display: flex;
  flex-direction: column; }
.figures dt { order: 1; font-size: 0.88rem; line-height: 1.35; }
.figures dd { order: 2; margin: 0; font-size: 0.82rem; color: var(--muted); }
.figures dt + dd { order: 0; font-size: 1.75rem; font-weight: 650; line-height: 1.3;
  color: var(--accent); letter-spacing: -0.02em; }
.wide { overflow-x: auto; margin: 0 0 1rem; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.32rem 0.9rem 0.32rem 0; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
thead th { color: var(--muted); font-weight: 500; font-size: 0.82rem; vertical-align: bottom; }
th.n, td.n { text-align: right; padding: 0.32rem 0 0.32rem 0.9rem; }
tr.fused td { color: var(--accent); font-weight: 600; }
.facts { width: auto; }
.facts th { color: var(--muted); font-weight: 500; padding-right: 2rem; vertical-align: top; }
.facts td { white-space: normal; overflow-wrap: anywhere; }
figure { margin: 0.5rem 0 1rem; }
svg { width: 100%; height: auto; display: block; stroke-linejoin: round; }
svg text { font-family: inherit; font-variant-numeric: tabular-nums; }
.maps th, .maps td { border: 0; padding: 2px; text-align: center; }
.maps thead tr:first-child th { color: var(--ink); font-weight: 600; padding-bottom: 0.2rem; }
.maps small { display: block; font-size: 0.72rem; }
.maps img { display: block; width: 100%; min-width: 4.5rem; aspect-ratio: 1; border-radius: 3px; }
.maps tbody th, .maps th:first-child { padding-right: 8px; }
.scale { display: flex; align-items: center; gap: 0.6rem; color: var(--muted); font-size: 0.82rem; }
.scale i { width: 10rem; height: 0.7rem; border-radius: 2px; }
footer { border-top: 1px solid var(--line); margin-top: 1.5rem; padding-top: 1rem;
  color: var(--muted); font-size: 0.85rem; }
@media print { main { max-width: none; padding: 0; } section { break-inside: avoid-page; } }
"""
