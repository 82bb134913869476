"""The judge of an export: the checkpoint as transformers itself loads, prepares and answers.

Nothing of what is judged is used here: files, tokenizer, chat template, image processor, model and
generate are transformers' own. Weights are mapped from their files (stored_weights.py), so that a
model of any size needs little memory.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers.image_processing_backends import TorchvisionBackend

from lvlm.core.errors import ValidationError
from lvlm.export.verify.their_processor import (
    image_options,
    load_processor,
    processor_class,
    quiet,
)
from lvlm.export.weights.stored_weights import compute_in_fp32
from lvlm.runtime.prompt.chat_template import Turn

TYPES = ("mm_token_type_ids", "token_type_ids")  # what a token is of, by the model's own words
SECONDS, MIN_STEPS = 30.0, 4  # of steps that are compared, and how many at least


@dataclass
class Verdict:
    """One greedy answer. ``features`` [V,D] stand in the place of the image's tokens, in blocks
    of D for every block they enter; ``logits`` [vocabulary] of every step are the model's own,
    ``scores`` what generate chose from after its processors; ``estimate`` says how the number of
    steps was chosen."""

    ids: list[int]
    features: torch.Tensor
    logits: list[torch.Tensor] = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    estimate: str = ""


class Judge:
    """A checkpoint folder in transformers' hands."""

    def __init__(self, folder: Path) -> None:
        """Raises ValidationError where transformers cannot load it."""
        self.folder = folder
        with quiet():
            self.tokenizer = self._load(transformers.AutoTokenizer, mistral_format=False)
            self.images, self.no_images = self._load_images()
            self.config = self._load(transformers.AutoConfig)
        kind = processor_class(self.config)
        self.image_options = image_options(kind, folder)
        self.processor, self.without = load_processor(kind, folder)
        self._types: dict[tuple[int, ...], dict[str, torch.Tensor]] = {}  # of prompts it has made

    def _load(self, kind: Any, **options: str | bool) -> Any:
        try:
            return kind.from_pretrained(self.folder, local_files_only=True, **options)
        except Exception as error:  # whatever a file of the checkpoint may cause there
            raise self._unloaded(kind.__name__, error) from None

    def _unloaded(self, kind: str, error: Exception) -> ValidationError:
        reason = " ".join(str(error).split())[:200]
        return ValidationError(
            f"transformers' {kind} cannot load {self.folder}: {reason}; mend the checkpoint, or "
            "export with --no-validate"
        )

    def _load_images(self) -> tuple[Any, str]:
        """The image processor; None, and the reason, where it needs what is not installed."""
        try:
            # Where torchvision is installed another would be taken, whose scaling rounds otherwise
            kind = transformers.AutoImageProcessor
            return kind.from_pretrained(self.folder, local_files_only=True, backend="pil"), ""
        except ImportError as error:
            needed = re.search(r"requires the (\w+) library", str(error))
            what = needed[1].lower() if needed else str(error).split(maxsplit=1)[0]
            return None, f"transformers' image processor of this model needs {what}"
        except Exception as error:
            raise self._unloaded("AutoImageProcessor", error) from None

    @property
    def exact(self) -> bool:
        """True where the image processor scales images as Pillow does; torch's is up to a level of
        256 apart."""
        return self.images is not None and not isinstance(self.images, TorchvisionBackend)

    def load_model(self, dtype: torch.dtype) -> None:
        """The model, its weights left in their files where they are of ``dtype``."""
        options = {"dtype": dtype, "output_loading_info": True}
        with quiet():
            try:
                model, info = transformers.AutoModelForImageTextToText.from_pretrained(
                    self.folder, local_files_only=True, **options
                )
            except Exception as error:  # see _load
                reason = " ".join(str(error).split())[:200]
                raise ValidationError(
                    f"transformers cannot load the model in {self.folder}: {reason}"
                ) from None
        if missing := sorted(info["missing_keys"]):
            raise ValidationError(
                f"transformers finds no weight {missing[0]} in {self.folder}"
                + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            )
        self.model: Any = compute_in_fp32(model)

    @property
    def eos_ids(self) -> set[int]:
        """Token ids that end an answer of generate."""
        eos = self.model.generation_config.eos_token_id
        return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)

    @property
    def special_tokens(self) -> dict[str, str]:
        """Special tokens by their names, as chat templates have them."""
        found = self.tokenizer.special_tokens_map.items()
        return {k: str(v) for k, v in found if not isinstance(v, list)}

    def template(self) -> bool:
        return bool(self._templates().chat_template)

    def _templates(self) -> Any:
        own = self.processor is not None and getattr(self.processor, "chat_template", None)
        return self.processor if own else self.tokenizer

    def render(self, turns: Sequence[Turn]) -> str | None:
        """The text of a conversation, ready for the answer; None where the template refuses it."""
        roles = list(dict.fromkeys(turn.role for turn in turns))
        found: list[str] = []
        for ways in product(("parts", "text"), repeat=len(roles)):
            messages = [self._message(turn, dict(zip(roles, ways, strict=True))) for turn in turns]
            try:
                with quiet():
                    text = self._templates().apply_chat_template(
                        messages, tokenize=False, add_generation_prompt=True
                    )
            except Exception:  # a template can raise whatever its expressions can
                continue
            found.append(str(text))

        def goodness(text: str) -> tuple[bool, int]:
            # A template that wants strings prints the list of parts, or nothing
            return "'type'" not in text, sum(turn.text.strip() in text for turn in turns)

        return max(found, key=goodness, default=None)

    def _message(self, turn: Turn, ways: Mapping[str, str]) -> dict[str, Any]:
        if ways[turn.role] == "text":
            placeholder = self.tokenizer.convert_ids_to_tokens(self.image_id)
            return {"role": turn.role, "content": f"{placeholder}\n" * turn.images + turn.text}
        parts: list[dict[str, Any]] = [{"type": "image"}] * turn.images
        return {"role": turn.role, "content": [*parts, {"type": "text", "text": turn.text}]}

    @property
    def image_id(self) -> int:
        """The token that stands for images."""
        found = getattr(self.config, "image_token_id", None)
        return int(self.config.image_token_index if found is None else found)

    def begins(self, text: str) -> bool:
        """True where a prompt has the token that begins a text in it: the tokenizer adds no
        other."""
        bos = self.tokenizer.bos_token
        return bool(bos) and text.startswith(bos)

    def encode(self, text: str, special: bool) -> list[int]:
        with quiet():
            return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Without special tokens, as answers are shown."""
        with quiet():
            found = self.tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        return str(found)

    def pixels(self, image: Image.Image) -> dict[str, torch.Tensor]:
        """The model's inputs that the image processor makes of one image."""
        with quiet():
            found = self.images(images=[image], **self.image_options, return_tensors="pt")
        return {k: v for k, v in found.items() if isinstance(v, torch.Tensor)}

    def ids(self, text: str, image: Image.Image) -> list[int] | None:
        """Token ids of a rendered prompt with its image; None where the folder's processor is not
        of this model."""
        if self.processor is None:
            return None
        special = not self.begins(text)
        with quiet():
            found = self.processor(
                images=[image], text=[text], add_special_tokens=special, return_tensors="pt"
            )
        ids = [int(x) for x in found["input_ids"][0]]
        self._types[tuple(ids)] = {name: found[name] for name in TYPES if name in found}
        return ids

    @torch.no_grad()
    def answer(
        self,
        ids: Sequence[int],
        image: Mapping[str, torch.Tensor],
        image_ids: set[int],
        max_tokens: int,
        tell: Callable[[str], None],
    ) -> Verdict:
        """generate as the checkpoint configures it, greedily; at least MIN_STEPS tokens, and as
        many of ``max_tokens`` as SECONDS allow."""
        tokens = torch.tensor([list(ids)])
        is_image = torch.isin(tokens[0], torch.tensor(sorted(image_ids)))
        taken = _taken(self.model, image)
        types = self._types.get(tuple(ids), {})
        for name in set(TYPES) & _parameters(self.model):
            taken.setdefault(name, types.get(name, is_image.int()[None]))
        seen: list[torch.Tensor] = []

        def watch(_: Any, args: Any, given: dict[str, Any]) -> None:
            if not seen:
                embedded = given.get("inputs_embeds")
                embedded = args[0] if embedded is None else embedded
                deepstack = given.get("deepstack_visual_embeds")
                parts = [embedded[0, is_image], *(deepstack if deepstack is not None else ())]
                seen.append(torch.cat([p.float() for p in parts], dim=-1))

        clock = _Clock(max_tokens)
        hook = self.model.get_decoder().register_forward_pre_hook(watch, with_kwargs=True)
        try:
            with quiet():
                out = self.model.generate(
                    input_ids=tokens,
                    attention_mask=torch.ones_like(tokens),
                    **taken,
                    do_sample=False,
                    num_beams=1,
                    max_new_tokens=max_tokens,
                    return_dict_in_generate=True,
                    output_logits=True,
                    output_scores=True,
                    stopping_criteria=transformers.StoppingCriteriaList([clock]),
                )
        except (ValueError, RuntimeError, IndexError) as error:  # of code that is not ours
            reason = " ".join(str(error).split())[:200]
            raise ValidationError(
                f"transformers' generate fails with the checkpoint in {self.folder} on an image of "
                f"{int(is_image.sum())} tokens: {reason}; export with --no-validate"
            ) from None
        finally:
            hook.remove()
        tell(clock.estimate)
        return Verdict(
            list(ids),
            seen[0],
            [x[0].float() for x in out.logits],
            [x[0].float() for x in out.scores],
            [int(t) for t in out.sequences[0, len(ids) :]],
            clock.estimate,
        )


class _Clock(transformers.StoppingCriteria):  # type: ignore[misc]
    """Ends an answer after as many tokens as the time allows, from the first step's time."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens, self.wanted, self.done = max_tokens, max_tokens, 0
        self.began = time.perf_counter()
        self.first = 0.0
        self.estimate = ""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # noqa: ARG002
        self.done += 1
        now = time.perf_counter() - self.began
        if self.done == 1:
            self.first = now
        if self.done <= 2:
            step = max(now - self.first, 1e-4)
            if self.done == 2:
                self.wanted = min(self.max_tokens, max(MIN_STEPS, int(SECONDS / step)))
            self.estimate = (
                f"{self.wanted} tokens are compared: {self.first:.1f} s for the prompt"
                + (f", {step:.2f} s a token" if self.done == 2 else "")
            )
        return torch.full((len(input_ids),), self.done >= self.wanted)


def _parameters(model: Any) -> set[str]:
    import inspect

    return set(inspect.signature(model.forward).parameters)


def _taken(model: Any, image: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Those of an image processor's arrays that the model has arguments for."""
    return {k: v for k, v in image.items() if k in _parameters(model)}
