# SPDX-License-Identifier: Apache-2.0
"""Speech that needs no download: every letter is a tone, every word a row of them, with noise over it."""

import json
import random
import struct
import wave
from pathlib import Path

import numpy as np


__all__ = ["LETTERS", "write_manifests"]

LETTERS = "abcdefghijklmnop"
RATE = 16_000
SECONDS_A_LETTER = 0.12


def write_manifests(
    folder: Path, *, train: int = 1600, validation: int = 128, letters: tuple[int, int] = (2, 4), seed: int = 0
) -> None:
    """Writes wav files and NeMo's manifests ``train.json`` and ``validation.json`` into a folder.

    Args:
        folder: Where to; made if it is not there. Files that are there already are written anew, the same.
        train: Number of utterances to train on.
        validation: Number of utterances to validate on.
        letters: Least and largest number of letters in each of an utterance's three words.
        seed: Seed of the texts and the noise.
    """
    random_text, noise = random.Random(seed), np.random.default_rng(seed)
    for name, count in ("train", train), ("validation", validation):
        (folder / name).mkdir(parents=True, exist_ok=True)
        lines = []
        for index in range(count):
            words = ["".join(random_text.choices(LETTERS, k=random_text.randint(*letters))) for _ in range(3)]
            text, path = " ".join(words), folder / name / f"{index:04d}.wav"
            seconds = _write_wav(path, text, noise)
            lines.append(json.dumps({"audio_filepath": str(path.resolve()), "duration": seconds, "text": text}))
        (folder / f"{name}.json").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_wav(path: Path, text: str, noise: np.random.Generator) -> float:
    """Writes the sound of a text and returns its length in seconds."""
    t = np.arange(int(RATE * SECONDS_A_LETTER)) / RATE
    hull = np.sin(np.pi * t / SECONDS_A_LETTER)
    # A fifth of an octave apart: 80 mel bands tell them from one another, and 16 of them stay below 2 kHz.
    tones = {letter: 220.0 * 2 ** (index / 5) for index, letter in enumerate(LETTERS)}
    silence = np.zeros_like(t)
    sound = np.concatenate([hull * np.sin(2 * np.pi * tones[c] * t) if c in tones else silence for c in text])
    samples = 0.3 * sound + 0.3 * noise.standard_normal(sound.size)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(struct.pack(f"<{samples.size}h", *(samples * 32767).astype(np.int16)))
    return samples.size / RATE
