"""Messages that a user can do nothing about go to the log, and all others to where they went before."""

from __future__ import annotations

import logging
import logging.handlers
import warnings
from collections.abc import Iterator

import pytest

from megamult import noise

APEX = "Apex is not installed. Falling back to Torch Norm"
UNTESTED = "**** You are using ZeRO with an untested optimizer, proceed with caution *****"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Warnings that `warnings` shows, as it did before noise's hook; pytest's own recording would catch them first."""
    found: list[str] = []
    monkeypatch.setattr(noise, "_shown_by", lambda message, *_: found.append(str(message)))
    return found


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """Lines that a rank's log gets, with noise's hooks in place, which pytest takes away from `warnings`."""
    lines: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = noise._show
        noise.quiet()
        noise.log_to(lines.append)
        lines.clear()  # what was said before this test
        yield lines
        noise.log_to(None)


def test_a_warning_is_kept_off_the_screen_only_if_it_is_listed(logged: list[str], shown: list[str]) -> None:
    warnings.warn(APEX, stacklevel=1)
    warnings.warn("Transformer Engine 3 is not what the checkpoint was made with", stacklevel=1)
    assert shown == ["Transformer Engine 3 is not what the checkpoint was made with"]
    assert len(logged) == 1 and f"UserWarning: {APEX}" in logged[0]


def test_records_of_deepspeeds_logger_pass_unless_they_are_listed(
    logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger, seen = logging.getLogger("DeepSpeed"), logging.handlers.BufferingHandler(10)
    # In place of DeepSpeed's own handler, and of pytest's, which may see a record twice.
    monkeypatch.setattr(logger, "handlers", [seen])
    monkeypatch.setattr(logger, "propagate", False)
    logger.warning(UNTESTED)
    logger.warning("gradient overflow in %s", "layer 3")
    assert [record.getMessage() for record in seen.buffer] == ["gradient overflow in layer 3"]
    assert logged == [f"DeepSpeed WARNING: {UNTESTED}"]


def test_a_record_whose_arguments_do_not_fit_is_left_to_the_handlers() -> None:
    assert noise._passes(logging.LogRecord("DeepSpeed", logging.WARNING, "file", 1, "%d layers", ("x",), None))


def test_a_users_own_logging_of_warnings_is_left_as_it_is(logged: list[str], caplog: pytest.LogCaptureFixture) -> None:
    logging.captureWarnings(True)
    try:
        warnings.warn(APEX, stacklevel=1)
        warnings.warn("my own", stacklevel=1)
    finally:
        logging.captureWarnings(False)
    assert len(caplog.records) == 1 and "my own" in caplog.records[0].getMessage()
    assert len(logged) == 1 and APEX in logged[0]


def test_printed_lines_appear_but_for_noise(logged: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with noise.unprinted():
        print("DeepSpeed deepspeed.ops.comm.deepspeed_shm_comm_op built successfully")
        print("backend is gloo")
    assert capsys.readouterr().out == "backend is gloo\n"
    assert logged == ["DeepSpeed deepspeed.ops.comm.deepspeed_shm_comm_op built successfully"]


def test_what_was_said_before_the_log_was_opened_is_in_it_too(logged: list[str]) -> None:
    noise.log_to(None)
    warnings.warn(APEX, stacklevel=1)
    assert logged == []
    noise.log_to(logged.append)
    assert len(logged) == 1 and APEX in logged[0]
