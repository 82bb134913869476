"""``tiny-llava`` before it is trained: tokenizer, shape, what its tower reads; storing it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from lvlm.calibration.datasets import digits

PATCHES = 12
IMAGE_TOKENS = PATCHES * PATCHES
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{ 'ASSISTANT: ' }}
{%- for part in message['content'] -%}{{ part['text'] }}{%- endfor -%}
{{ eos_token }}
{%- else -%}
{{ 'USER: ' if message['role'] == 'user' else '' }}
{%- for part in message['content'] if part['type'] == 'image' -%}
{{ '<image>\\n' }}
{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{{ part['text'] + ' ' }}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE (any text can be encoded) with every decimal digit a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\d| ?[^\s\d]+|\s"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [
        f"USER: \n{q.question} ASSISTANT: {q.answer}" for _, q in digits.samples("train", 400)
    ]
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=5,  # the feature layer is -2, as in LLaVA-1.5, so four are used
        num_attention_heads=4,
        image_size=digits.SIDE,
        patch_size=14,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=512,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=image_id,
            image_seq_length=IMAGE_TOKENS,
            vision_feature_layer=-2,
            tie_word_embeddings=False,
        )
    )
    with torch.no_grad():  # 2-D sinusoids: the tower starts out knowing which patches are near
        table = model.model.vision_tower.embeddings.position_embedding.weight
        table[1:] = 0.5 * sinusoids_2d(PATCHES, table.shape[1])
    return model


def sinusoids_2d(side: int, width: int) -> torch.Tensor:
    """Position table [side * side, width]: half for the row, half for the column."""
    step = torch.arange(side)[:, None] * math.pi / side
    freq = torch.arange(1, width // 4 + 1)[None] / 2
    line = torch.cat([torch.sin(step * freq), torch.cos(step * freq)], 1) / math.sqrt(width / 8)
    rows = line.repeat_interleave(side, 0)
    return torch.cat([rows, line.repeat(side, 1)], 1)


def pixels(grids: list[digits.Grid]) -> torch.Tensor:
    """Normalised [B, 3, 168, 168]; the images already have the size the processor makes."""
    scale = CLIPImageProcessorPil()
    images = np.stack([g.image for g in grids]).astype(np.float32) / 255
    images = (images - np.array(scale.image_mean)) / np.array(scale.image_std)
    return torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32))


def patch_features(model: LlavaForConditionalGeneration, images: torch.Tensor) -> torch.Tensor:
    """[B, 144, 128]: what the projector reads."""
    out = model.model.vision_tower(images, output_hidden_states=True)
    patches: torch.Tensor = out.hidden_states[-2][:, 1:]
    return patches


def save(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, output: Path
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    model.generation_config.eos_token_id = 2
    model.half().save_pretrained(output)
    side = {"height": digits.SIDE, "width": digits.SIDE}
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": digits.SIDE}, crop_size=side)
    LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(output)


def save_samples(folder: Path) -> None:
    """The images of README and tests: held-out grids."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (grid, _) in enumerate(digits.samples("heldout", 2, seed=7), 1):
        Image.fromarray(grid.image).save(folder / f"digits-{number}.png")
