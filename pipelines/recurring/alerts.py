"""Alerts: a command or a webhook for what somebody should know.

Enters: a record and its events. Leaves: for each alert what came of it, for the record. Always holds: an alert that fails
never fails the run; it is sent before the record is written, so after a crash it may come twice but is never left out.
"""

from __future__ import annotations

import json
import os
import subprocess
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from pipelines.recurring.recipe import Alert, Event


def send_alerts(
    alerts: Sequence[Alert], pipeline: str, events: Sequence[Event], text: str, record: dict[str, Any]
) -> list[dict[str, Any]]:
    """Send what the recipe asks for.

    Args:
        events: what has happened; each alert is sent once, for the first of them that it is about.

    Returns:
        `{"to", "event", "error"}` of each that was sent; `error` is "" where it arrived.
    """
    sent = []
    for alert in alerts:
        if event := next((e for e in events if e in alert.on), None):
            body = json.dumps({"text": text, "pipeline": pipeline, "event": event, "record": record}).encode()
            error = _post(alert, body) if alert.webhook else _call(alert, body, pipeline, event, text)
            # The rest of a webhook's address is what lets one write there: it is kept out of records and pages.
            to = urlsplit(alert.webhook).netloc if alert.webhook else (alert.command or [""])[0]
            sent.append({"to": to, "event": event, "error": error})
    return sent


def _call(alert: Alert, body: bytes, pipeline: str, event: str, text: str) -> str:
    """Run a command; what went wrong, or ""."""
    assert alert.command
    variables = {"BRAID_PIPELINE": pipeline, "BRAID_EVENT": event, "BRAID_TEXT": text}
    try:
        done = subprocess.run(
            alert.command,
            input=body,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=alert.timeout_s,
            env={**os.environ, **variables},
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    said = done.stderr.decode(errors="replace").strip()[-300:]
    return f"exit code {done.returncode}: {said}" if done.returncode else ""


def _post(alert: Alert, body: bytes) -> str:
    """Ask a webhook; what went wrong, or ""."""
    request = urllib.request.Request(
        alert.webhook or "", data=body, headers={"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=alert.timeout_s):
            return ""
    except (OSError, ValueError) as error:
        # Of a refusal too: HTTPError is an OSError.
        return str(error)
