"""The page's style sheet: light and dark, wide and narrow, paper. Nothing in it is fetched.

The colours c0 to c6 have a contrast of 3 or more to the page, and stay apart (CIE Lab distance 23 or more) in simulated
protanopia, deuteranopia and tritanopia, in the light set and in the dark one.
"""

from __future__ import annotations

CSS = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --ink: #1c2025; --soft: #5c6570; --line: #d9dde2; --grid: #d3d8de;
  --panel: #f5f6f8; --accent: #0b5c94;
  --c0: #0077f0; --c1: #77370e; --c2: #079d6b; --c3: #df3fa0; --c4: #ad6a0a; --c5: #07335e; --c6: #565656;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --ink: #e4e7eb; --soft: #a0a9b4; --line: #353b43; --grid: #3a4149;
    --panel: #1d2126; --accent: #7cc0f2;
    --c0: #4cb1fd; --c1: #ff8f22; --c2: #66f5bf; --c3: #b1338c; --c4: #fedd7c; --c5: #b1e5f5; --c6: #9e9e9e;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; padding: 0 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
body > * { max-width: 76rem; margin-left: auto; margin-right: auto; }
h1 { font-size: clamp(1.5rem, 1.1rem + 1.6vw, 2.1rem); line-height: 1.2; margin: 2rem auto 0.4rem; }
h1, h2, h3, figcaption { overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 3rem 0 0.6rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 0.5rem; }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
a { color: var(--accent); }
.about { color: var(--soft); margin-top: 0; margin-bottom: 1.2rem; max-width: 76rem; }
.summary { font-size: 1.06rem; max-width: 62rem; background: var(--panel); border-left: 4px solid var(--accent); }
.summary { padding: 0.9rem 1.2rem; margin-left: 0; }
.summary p { margin: 0; max-width: none; }
.caveats { padding-left: 1.2rem; }
nav ul { display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; padding: 0; margin: 1.2rem 0 0; list-style: none; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1.5rem 2.2rem; }
figure { margin: 0.6rem 0; min-width: 0; max-width: 37rem; }
figure > svg { display: block; width: 100%; height: auto; }
figcaption { font-weight: 600; margin-bottom: 0.3rem; }
.caption, .note { color: var(--soft); font-size: 0.88rem; margin: 0.4rem 0; }
.legend {
  display: flex; flex-wrap: wrap; gap: 0.15rem 1.1rem; list-style: none; padding: 0; margin: 0.4rem 0 0;
  font-size: 0.86rem;
}
.legend li { display: flex; align-items: center; gap: 0.4rem; min-width: 0; }
.legend svg { flex: none; width: 36px; height: 12px; }
.scroll { overflow-x: auto; margin: 0.4rem 0; border: 1px solid var(--line); border-radius: 6px; }
table {
  border-collapse: separate; border-spacing: 0; width: 100%; font-size: 0.88rem; font-variant-numeric: tabular-nums;
}
th, td { padding: 0.4rem 0.6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
tr:last-child > * { border-bottom: 0; }
thead th {
  background: var(--panel); font-weight: 600; vertical-align: bottom; white-space: normal; overflow-wrap: break-word;
  min-width: 4.2rem; max-width: 11rem;
}
tbody th { font-weight: 600; }
.word { white-space: nowrap; }
th:first-child, .text, .brief { text-align: left; }
tbody th:first-child, thead th:first-child { position: sticky; left: 0; z-index: 1; }
tbody th { background: var(--page); }
tbody th.text { min-width: 9rem; max-width: 16rem; white-space: normal; overflow-wrap: break-word; }
td.text { white-space: normal; min-width: 10rem; max-width: 34rem; overflow-wrap: anywhere; }
td.best { font-weight: 700; }
details { margin: 0.6rem 0; }
summary { cursor: pointer; color: var(--accent); padding: 0.2rem 0; overflow-wrap: anywhere; }
pre {
  background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: 0.8rem 1rem; overflow-x: auto;
  font: 0.8rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; max-height: 34rem;
}
@media (max-width: 40rem) {
  body { padding: 0 0.9rem 3rem; }
  tbody th.text { max-width: 9rem; min-width: 6rem; }
  th, td { padding: 0.35rem 0.55rem; }
  .summary { padding: 0.8rem 0.9rem; font-size: 1rem; }
}
@media print {
  :root {
    color-scheme: light;
    --page: #ffffff; --ink: #000000; --soft: #444444; --line: #bbbbbb; --grid: #cccccc;
    --panel: #f3f3f3; --accent: #000000;
    --c0: #0077f0; --c1: #77370e; --c2: #079d6b; --c3: #df3fa0; --c4: #ad6a0a; --c5: #07335e; --c6: #565656;
  }
  @page { margin: 14mm; }
  body { padding: 0; font-size: 10pt; }
  body > *, p, li, figure { max-width: none; }
  nav { display: none; }
  h2, h3, figcaption { break-after: avoid; }
  h2 { margin-top: 1.6rem; }
  .note, .caption, .legend { font-size: 8pt; }
  figure, tr, .summary { break-inside: avoid; }
  .pictures { grid-template-columns: 1fr 1fr; gap: 1rem; }
  .scroll { overflow: visible; border: 0; }
  table { font-size: 7.5pt; }
  th, td { padding: 0.15rem 0.3rem; white-space: normal; }
  thead th, tbody th.text, td.text { min-width: 0; }
  td.brief { white-space: nowrap; }
  pre { max-height: none; white-space: pre-wrap; overflow-wrap: anywhere; }
  details.numbers::details-content { content-visibility: visible; block-size: auto; }
}
"""
