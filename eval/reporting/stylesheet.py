"""How a report looks: wide and narrow, by day and by night."""

# `.wide`: a phone shows no scroll bar, so a shade at the right edge tells that a table goes on. What covers the shade
# scrolls with the table, and lies over it where the table ends.

STYLESHEET = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1c1f23;--faint:#5b6470;--line:#d5d9de;--soft:#f3f5f7;--warn:#fff4d6;
--edge:#c98a00;--link:#0b5cad;--gone:#ffe1dc;--new:#d9f2dd;--good:#1a7f37;--shade:#1c1f2366}
@media(prefers-color-scheme:dark){:root{--paper:#15181c;--ink:#e4e7eb;--faint:#9aa4b0;--line:#353b43;--soft:#1f242a;
--warn:#3a2f10;--edge:#d9a441;--link:#7db7f2;--gone:#572a26;--new:#1d4427;--good:#5fd07e;--shade:#e4e7eb66}}
body{font:16px/1.5 system-ui,sans-serif;max-width:88em;margin:2em auto;padding:0 1em;color:var(--ink);
background:var(--paper);overflow-wrap:anywhere}
h1{line-height:1.2;font-size:1.7em}p{max-width:52em}
a{color:var(--link)}nav{margin:1.2em 0}summary{cursor:pointer}nav ol{columns:20em;column-gap:2.5em;padding-left:1.5em}
h2{margin-top:2.2em;border-top:1px solid var(--line);padding-top:.6em;line-height:1.25}
.verdict{list-style:none;padding:0;margin:1em 0;font-size:1.08em}.verdict li+li{margin-top:.4em}
.verdict li{padding:.7em 1.1em;background:var(--soft);border-left:4px solid var(--good)}
.verdict .missed{border-left:4px dashed var(--edge)}
.wide{overflow-x:auto;margin:1em 0;overflow-wrap:normal;
background:linear-gradient(to left,var(--paper) 40%,transparent) right/3em 100% no-repeat local,
linear-gradient(to left,var(--shade),transparent) right/1em 100% no-repeat scroll}
table{border-collapse:collapse;font-size:.92em;
font-variant-numeric:tabular-nums}
td,th{padding:.3em .8em;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}td b{color:var(--good)}
th{vertical-align:bottom}td.words,th.words{text-align:left}td:first-child,th:first-child{text-align:left;position:sticky;
left:0;background:var(--paper)}
@media(max-width:40em){td:first-child,th:first-child{white-space:normal;overflow-wrap:anywhere;min-width:8em;
max-width:11em}td,th{padding:.3em .5em}}
tr.paper td{color:var(--faint);font-style:italic}
figure{margin:1em 0}.picture{overflow-x:auto}figure img{max-width:100%;min-width:min(40em,100vw*1.7);height:auto;
background:#fff;border-radius:4px}
figcaption{color:var(--faint);font-size:.92em;max-width:60em}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(27em,100%),1fr));gap:1em}
.panels>div{height:27em;min-width:0}.panels.one{grid-template-columns:minmax(0,62em)}.panels.one>div{height:31em}
.beside>p{margin:1em 0}@media(min-width:68em){.beside{display:grid;grid-template-columns:minmax(18em,1fr) minmax(0,2fr);
gap:2em;align-items:start}}
.warn{background:var(--warn);border-left:4px solid var(--edge);padding:.6em .9em;margin:1em 0}
pre{background:var(--soft);padding:.8em;overflow-x:auto;font-size:.85em;overflow-wrap:normal;max-height:30em}
.answers{display:grid;gap:.8em;margin:1em 0}.answer{border:1px solid var(--line);border-radius:6px;overflow:hidden}
.answer h4{margin:0;padding:.45em .8em;background:var(--soft);font-weight:600;font-size:.95em}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(13em,100%),1fr))}
.answers>div{padding:.45em .8em;border-top:1px solid var(--line)}.answers small{display:block;color:var(--faint)}
.answers span{white-space:pre-line}del,ins{border-radius:3px;padding:0 .15em}del{background:var(--gone)}
ins{background:var(--new);text-decoration:none}
"""
