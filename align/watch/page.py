"""The live page without data: the report's frame and style sheet, and the script that requests and draws the data."""

from __future__ import annotations

from pathlib import Path

from align.eval.report.page import POLICY as REPORT_POLICY
from align.eval.report.page import page, policy_of

_FOLDER = Path(__file__).parent
SCRIPT = (_FOLDER / "watch.js").read_text(encoding="utf-8")
STYLE = (_FOLDER / "watch.css").read_text(encoding="utf-8")
_CONNECTS_TO_ITS_SERVER = f"{REPORT_POLICY}; connect-src 'self'"
POLICY = policy_of(SCRIPT, _CONNECTS_TO_ITS_SERVER)
"""The content security policy: that of a report, but the script may request data from the server of the page."""
BODY = """
<header>
<p class="soft">Live report</p><h1 id="title">…</h1>
<p id="about" hidden></p>
<p id="status" class="soft" role="status">Connecting …</p>
<form id="login" class="controls" hidden>
<label class="wide">Token of the server
<input id="token" type="password" autocomplete="current-password" required></label>
<button>Show</button>
</form>
<dl class="tiles" id="tiles"></dl>
</header>
<main id="main" hidden>
<section id="runs" hidden><h2>Runs</h2>
<div class="scroll" tabindex="0" role="region" aria-label="Runs"><table class="sticky"><thead><tr>
<th scope="col">Run</th><th scope="col">Stage</th><th scope="col">Step</th><th scope="col">Time left</th>
<th scope="col">Throughput</th><th scope="col">Peak memory</th><th scope="col">Last change</th>
</tr></thead><tbody id="run-rows"></tbody></table></div></section>
<section><h2>Stages</h2><div id="stage-bars"></div></section>
<section id="comparison" hidden><h2>Comparison</h2><div id="comparison-body"></div></section>
<section><h2>Curves</h2>
<div class="controls">
<label>Steps<select id="range">
<option value="1">all</option><option value="0.5">last half</option><option value="0.1">last tenth</option>
</select></label>
<label class="check"><input id="log" type="checkbox"> logarithmic scale</label>
<label class="check"><input id="pause" type="checkbox"> pause</label>
</div>
<div id="stages"></div></section>
</main>
<noscript><p>This page needs JavaScript: it draws the curves in the browser.</p></noscript>
"""


def live_page() -> str:
    return page("align watch", [BODY], script=SCRIPT, style=STYLE, policy=_CONNECTS_TO_ITS_SERVER)
