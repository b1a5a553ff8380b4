"""Speech made by espeak-ng, whose library the package `espeakng-loader` brings along.

Enters: texts and the name of a voice. Leaves: float32 waveforms. Always holds: a voice that is not there is an error; and the
library is one for a process and keeps state, so what is said depends on what was said before: start a process for each
batch that shall come out the same again.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.corpus.errors import CorpusError

_SYNCHRONOUS, _DONT_EXIT = 2, 0x8000
"""Without a thread of the library's own, which now and then does not end with `espeak_Terminate`."""
_UTF8 = 1
_OK = 0

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def _library() -> tuple[ctypes.CDLL, Path]:
    try:
        import espeakng_loader  # type: ignore[import-untyped]
    except ImportError as error:
        raise CorpusError("speaking captions needs espeak-ng's library: pip install espeakng-loader") from error
    return ctypes.CDLL(espeakng_loader.get_library_path()), Path(espeakng_loader.get_data_path())


def voices() -> list[str]:
    """What can be spoken, such as `de` or `en-US`."""
    _, data = _library()
    return sorted(file.name for file in (data / "lang").rglob("*") if file.is_file())


def speak(texts: Iterable[str], voice: str) -> Iterator[tuple[NDArray[np.floating], int]]:
    """Each text as a waveform float32 [samples] within -1..1, and its rate in Hz.

    Raises:
        CorpusError: the library is missing or has no such voice.
    """
    library, data = _library()
    rate_hz = library.espeak_Initialize(_SYNCHRONOUS, 0, str(data.parent).encode(), _DONT_EXIT)
    if rate_hz <= 0:
        raise CorpusError(f"{data}: espeak-ng cannot use these voices; install espeakng-loader again")
    pieces: list[NDArray[np.int16]] = []

    def heard(samples: ctypes._Pointer[ctypes.c_short] | None, count: int, events: int) -> int:
        if samples and count > 0:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    # Kept in a name of its own, for the library holds no reference to it.
    callback = _Callback(heard)
    library.espeak_SetSynthCallback(callback)
    try:
        if library.espeak_SetVoiceByName(voice.encode()) != _OK:
            raise CorpusError(f"voice {voice!r}: espeak-ng has none of that name; it has {', '.join(voices())}")
        for text in texts:
            pieces.clear()
            spoken = text.encode() + b"\0"
            if library.espeak_Synth(spoken, len(spoken), 0, 1, 0, _UTF8, None, None) != _OK:
                raise CorpusError(f"voice {voice!r}: espeak-ng does not speak {text!r}")
            waveform = np.concatenate(pieces) if pieces else np.zeros(0, np.int16)
            yield waveform.astype(np.float32) / np.float32(2**15), rate_hz
    finally:
        library.espeak_Terminate()
