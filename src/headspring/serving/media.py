"""Pictures and sounds in a request: base64 in the JSON, PNG, JPEG or WAV, sizes checked before anything is decoded.

Nothing is fetched and no path is opened: an address in `image_url` that is not a `data:` URL is refused. The two picture
formats are named to the decoder, so that none of its other thirty parsers is within reach of a client.
"""

import base64
import binascii
import io
import wave

import numpy as np
import torch

from headspring.models.audio import Sound
from headspring.models.model import Model
from headspring.models.multimodal import Multimodal
from headspring.models.tower import Tower
from headspring.models.vision import Vision
from headspring.serving.config import Limits
from headspring.serving.errors import ApiError, refuse
from headspring.serving.requests import AudioPart, ImagePart

FORMATS = {"data:image/png;base64": "PNG", "data:image/jpeg;base64": "JPEG"}


class Sink:
    """Takes the items of one conversation in their order, for the towers of `model`."""

    def __init__(self, model: Model, limits: Limits):
        self.towers: dict[str, Tower] = model.towers if isinstance(model, Multimodal) else {}
        self.limits = limits
        self._items: dict[str, list[torch.Tensor]] = {}

    def add(self, part: ImagePart | AudioPart) -> list[int]:
        """The placeholders that stand for this item."""
        if sum(map(len, self._items.values())) >= self.limits.media:
            raise ApiError(400, f"a request may have {self.limits.media} pictures and sounds", "limit", "messages")
        kind = Vision if isinstance(part, ImagePart) else Sound
        found = next(((name, tower) for name, tower in self.towers.items() if isinstance(tower, kind)), None)
        if found is None:
            raise refuse(f"this model takes no {'pictures' if kind is Vision else 'sounds'}", "messages")
        name, tower = found
        if isinstance(part, ImagePart):
            assert isinstance(tower, Vision)
            item = picture(part.image_url.url, tower, self.limits)
        else:
            assert isinstance(tower, Sound)
            item = sound(part.input_audio.data, tower)
        self._items.setdefault(name, []).append(item)
        return [tower.placeholder] * tower.num_pieces

    def items(self) -> dict[str, torch.Tensor]:
        """(1, N, …) float32 by tower."""
        return {name: torch.stack(items)[None] for name, items in self._items.items()}


def picture(url: str, tower: Vision, limits: Limits) -> torch.Tensor:
    """(channels, height, columns) float32 in 0 … 1, scaled to the size that the tower reads."""
    head, _, data = url.partition(",")
    if head.lower() not in FORMATS:
        raise refuse(f"a picture comes inline, as {' or '.join(FORMATS)},…; this server fetches nothing", "image_url")
    from PIL import Image

    modes = {1: "L", 3: "RGB", 4: "RGBA"}
    if tower.channels not in modes:
        raise refuse(f"this model's pictures have {tower.channels} channels, which no PNG or JPEG has", "image_url")
    raw = _decoded(data, "image_url")
    try:
        with Image.open(io.BytesIO(raw), formats=[FORMATS[head.lower()]]) as opened:
            if opened.width * opened.height > limits.pixels:
                size = f"{opened.width} × {opened.height}"
                raise ApiError(400, f"a picture of {size} pixels, and this server allows {limits.pixels}", "limit", "image_url")
            small = opened.convert(modes[tower.channels]).resize((tower.columns, tower.height), Image.Resampling.BILINEAR)
            pixels = np.asarray(small, np.float32) / 255
    except ApiError:
        raise
    except Exception as error:  # a decoder's errors on damaged data are of any kind
        raise refuse(f"the picture cannot be read ({type(error).__name__})", "image_url") from None
    return torch.from_numpy(pixels.reshape(tower.height, tower.columns, -1).transpose(2, 0, 1).copy())


def sound(data: str, tower: Sound) -> torch.Tensor:
    """(samples,) float32 in −1 … 1, with silence after a short one. 16-bit PCM of one channel at the tower's rate."""
    raw = _decoded(data, "input_audio")
    try:
        with wave.open(io.BytesIO(raw)) as opened:
            form = (opened.getnchannels(), opened.getsampwidth(), opened.getframerate())
            frames = opened.readframes(tower.samples + 1)
    except Exception as error:
        raise refuse(f"the sound cannot be read ({type(error).__name__})", "input_audio") from None
    if form != (1, 2, tower.rate):
        raise refuse(
            f"a sound must be one channel of 16 bits at {tower.rate} Hz, not (channels, bytes, rate) = {form}", "input_audio"
        )
    heard = np.frombuffer(frames[: len(frames) // 2 * 2], "<i2").astype(np.float32) / 32768
    if len(heard) > tower.samples:
        raise refuse(f"this model hears {tower.samples} samples, and the sound has more; cut it", "input_audio")
    return torch.from_numpy(np.pad(heard, (0, tower.samples - len(heard))))


def _decoded(data: str, param: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise refuse("the data are not base64", param) from None
