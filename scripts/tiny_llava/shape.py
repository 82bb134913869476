"""``tiny-llava`` before it is trained: tokenizer, shape, what its tower reads; storing it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
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

from lvlm.calibration.datasets.scenes.drawing import DENSITIES, PATCH, SIDE, draw_scene
from lvlm.calibration.datasets.scenes.questions import KINDS, ask

PATCHES = SIDE // PATCH
IMAGE_TOKENS = PATCHES * PATCHES
VISION_WIDTH = 192
VOCABULARY = 640
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, as the processor has them
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
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
    split = pre_tokenizers.Split(Regex(r"\d| ?\p{L}+|\s|[^\s\p{L}\d]"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = np.random.default_rng(2)
    corpus = []
    for number in range(1500):
        scene = draw_scene(rng, "train", DENSITIES[number % len(DENSITIES)])
        for question, answer in ask((scene, scene), KINDS[number % len(KINDS)], rng):
            corpus.append(f"USER: \n{question} ASSISTANT: {answer}")
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
        model_max_length=4096,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=576,
        num_hidden_layers=6,  # the feature layer is -2, as in LLaVA-1.5, so five are used
        num_attention_heads=6,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=VISION_WIDTH,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=576,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
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


def normalised(images: torch.Tensor) -> torch.Tensor:
    """[B, 3, SIDE, SIDE] of uint8 images [B, SIDE, SIDE, 3], which have the processor's size."""
    mean = torch.tensor(IMAGE_MEAN, device=images.device)
    std = torch.tensor(IMAGE_STD, device=images.device)
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def patch_features(model: LlavaForConditionalGeneration, images: torch.Tensor) -> torch.Tensor:
    """[B, IMAGE_TOKENS, VISION_WIDTH]: what the projector reads."""
    out = model.model.vision_tower(normalised(images), output_hidden_states=True)
    patches: torch.Tensor = out.hidden_states[-2][:, 1:]
    return patches


def save(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, output: Path
) -> None:
    """Weights in fp16 and all side files."""
    output.mkdir(parents=True, exist_ok=True)
    model.generation_config.eos_token_id = 2
    model.half().save_pretrained(output)
    side = {"height": SIDE, "width": SIDE}
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=side)
    LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(output)
