"""Named recipes as values: what each command runs, with what is known of its result.

``lesson``: two CPU cores, seconds to minutes. ``small``: the same embedded data on one GPU, each
stage under 20 minutes. ``paper``: the released recipe, on 32 and 8 GPUs. Every number that is not
ours comes from the released configs or README of BEVT.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

from bevt_lib.base import config
from bevt_lib.base.config import Data, Finetune, Masking, Model, Optim, Pretrain, Run, Tokens

Recipe = TypeVar("Recipe", bound=config.Recipe)

RELEASED_NO_DECAY = (("relative_position_bias_table", 1.0, 0.0), ("norm", 1.0, 0.0))
# Small models from small data: bias tables at ten times the rate (measured in the kit's pilot).
LESSON_RULES = (("relative_position_bias_table", 10.0, 0.0), ("norm", 1.0, 0.0))
lesson_optim = partial(Optim, clip_norm=3.0, rules=LESSON_RULES)

# 96 px, window 3, grid 6x6: the paper's 224 px, window 7, grid 14x14, scaled by 3/7.
LESSON_MODEL = Model(embed_dim=24, depths=(1, 1, 3, 1), num_heads=(1, 2, 4, 8), window=(4, 3, 3),
                     drop_path=0.0, linear_std=0.0)  # fmt: skip
LESSON_DATA = Data(frames=8, interval=1, size=96, short=(98, 112))
LESSON_TOKENS = Tokens(vocab_size=256)
LESSON_MASKING = Masking(tube=(0.5, 0.75))  # of 4 time steps: each place is seen at some time

# The lesson's pixels (the clips have no more); all 16 frames of a clip, the paper's 8 time steps.
# The minutes below are those of scoring.cost, by Swin-B's share of the peak. Small matrices
# reach a smaller one: hence the room up to 20 minutes.
SMALL_MODEL = Model(embed_dim=64, depths=(2, 2, 6, 2), num_heads=(2, 4, 8, 16), window=(8, 3, 3),
                    drop_path=0.1, linear_std=0.0)  # fmt: skip
SMALL_DATA = replace(LESSON_DATA, frames=16, workers=6)


def lesson_dvae() -> config.TrainTokenizer:
    """DALL-E's tokenizer, narrow, with 256 token ids, on the embedded training pictures.

    Trains on 32 px views of 64 px crops, the scale at which BEVT shows it 48 px views of 96 px
    crops. After 4,500 steps with Gumbel noise, 2,500 choose ids as in use, without noise, and
    1,200 train the decoder alone to paint them. One CPU core; ours, no paper row.
    """
    return config.TrainTokenizer(
        name="lesson_dvae", data=replace(LESSON_DATA, size=64), tokens=LESSON_TOKENS,
        optim=Optim(lr=4e-3, weight_decay=0.0, images=32, steps=4500, warmup=100, clip_norm=3.0,
                    restarts=((2500, 0.5), (1200, 0.5)), rules=(("encoder", 0.5, 1.0),)),
        hidden=32, blocks=1, kl_weight=(0.0, 0.0), balance_weight=0.1)  # fmt: skip


def lesson_peco() -> config.TrainPeco:
    """PeCo's tokenizer with 256 codes, on the embedded training pictures, as BEVT shows them.

    Its perceptual network knows ImageNet's labels: see ``perceptual.py``, and take --perceptual
    bevt_lesson_image for the label-free control, none for a plain VQ-VAE. One CPU core, 6, 5 and
    2.5 minutes; ours, no paper row. On test stills 17.6 dB (17.7 label-free, 18.6 plain; mean
    colours 16.7), and *what* is read from its ids with 0.35 (0.35, 0.30; two seeds, standard error
    0.02; but 0.40 from the lesson dVAE's, 0.43 from k-means's): ``tokenizer_scores``.
    """
    return config.TrainPeco(
        name="lesson_peco", data=LESSON_DATA, tokens=LESSON_TOKENS,
        optim=Optim(lr=1e-3, weight_decay=0.0, images=16, steps=4000, warmup=100, clip_norm=3.0),
        hidden=32, blocks=1, code_dim=32, perceptual_side=64, perceptual_weight=2.0)  # fmt: skip


def lesson_image() -> Pretrain:
    """Image-stream pretraining on the embedded stills. Two CPU cores; ours, no paper row."""
    return Pretrain(
        name="lesson_image", streams=("image",), model=LESSON_MODEL, data=LESSON_DATA,
        tokens=LESSON_TOKENS, masking=LESSON_MASKING,
        optim=lesson_optim(lr=3e-3, images=32, steps=2200, warmup=100))  # fmt: skip


def lesson_joint() -> Pretrain:
    """Joint pretraining on embedded clips and stills, from the shipped image-stream weights.

    Two CPU cores; ours, no paper row.
    """
    return Pretrain(
        name="lesson_joint", streams=("video", "image"), model=LESSON_MODEL, data=LESSON_DATA,
        tokens=LESSON_TOKENS, masking=LESSON_MASKING, keep_token_head=True,
        optim=lesson_optim(lr=2e-3, clips=8, images=8, steps=1400, warmup=100),
        default_init="weights/lesson_image.safetensors", needs_init=True)  # fmt: skip


def lesson_what() -> Finetune:
    """Recognise what moves (8 kinds of object). Two CPU cores; ours, no paper row."""
    return Finetune(
        name="lesson_what", task="what", num_classes=8, model=LESSON_MODEL, data=LESSON_DATA,
        optim=lesson_optim(lr=1e-3, clips=16, steps=800, warmup=100), crop="random",
        test_clips=3, test_crops=1, default_init="weights/lesson_joint.safetensors")  # fmt: skip


def lesson_how() -> Finetune:
    """Recognise how a clip moves (8 motions) from raw frames. Two CPU cores; ours, no paper row.

    All 3D patch filters start antisymmetric in time, which overwrites half of each pretrained one.
    """
    return replace(lesson_what(), name="lesson_how", task="how", flip=False, antisymmetric=1.0)


def small_dvae() -> config.TrainTokenizer:
    """A wider tokenizer with 1024 token ids, on 48 px inputs as BEVT shows them.

    One GPU, about 4 minutes on an A100 at the share of its peak that ``cost`` assumes for Swin.
    Command: python -m bevt_lib.train_tokenizer small_dvae.
    ``small_image`` and ``small_joint`` take it, both or neither, by
    --tokens.weights runs/small_dvae/tokenizer.safetensors.
    Ours, no paper row. Not run by us: no number to expect.
    """
    return config.TrainTokenizer(
        name="small_dvae", data=replace(LESSON_DATA, workers=6), tokens=Tokens(vocab_size=1024),
        optim=Optim(lr=2e-3, weight_decay=0.0, images=128, steps=6000, warmup=200, clip_norm=3.0,
                    restarts=((3000, 0.5), (1500, 0.5)), rules=(("encoder", 0.5, 1.0),)),
        hidden=64, kl_weight=(0.0, 0.0), balance_weight=0.1)  # fmt: skip


def small_image() -> Pretrain:
    """Image-stream pretraining on the embedded stills, with the shipped lesson tokenizer's ids.

    One GPU, by its plan about 3 minutes on an A100. Command: python -m bevt_lib.pretrain
    small_image.
    Ours, no paper row. Not run by us: no number to expect.
    """
    return Pretrain(
        name="small_image", streams=("image",), model=SMALL_MODEL, data=SMALL_DATA,
        tokens=LESSON_TOKENS,
        optim=lesson_optim(lr=1.5e-3, images=256, steps=6000, warmup=300))  # fmt: skip


def small_joint() -> Pretrain:
    """Joint pretraining on embedded clips and stills, from a run of ``small_image``.

    One GPU, by its plan about 5 minutes on an A100. Command: python -m bevt_lib.pretrain
    small_joint --run.init runs/small_image/model. The token head goes on: give the same tokenizer.
    Ours, no paper row. Not run by us: no number to expect.
    """
    return Pretrain(
        name="small_joint", streams=("video", "image"), model=SMALL_MODEL, data=SMALL_DATA,
        tokens=LESSON_TOKENS,
        optim=lesson_optim(lr=1e-3, clips=64, images=64, steps=4000, warmup=200),
        keep_token_head=True, needs_init=True)  # fmt: skip


def small_what() -> Finetune:
    """Recognise what moves (8 kinds of object), from a run of ``small_joint``.

    One GPU, by its plan about 3 minutes on an A100. Command: python -m bevt_lib.finetune
    small_what --run.init runs/small_joint/model. Ours, no paper row. Not run by us: no number to
    expect (chance: 0.125).
    """
    return Finetune(
        name="small_what", task="what", num_classes=8, model=SMALL_MODEL, data=SMALL_DATA,
        optim=lesson_optim(lr=5e-4, clips=64, steps=3000, warmup=200),
        crop="random", val_epochs=5, test_crops=1, test_clips=1,  # a view shows all frames
    )  # fmt: skip


def small_how() -> Finetune:
    """Recognise how a clip moves (8 motions), from a run of ``small_joint``.

    One GPU, by its plan about 3 minutes on an A100. Command: python -m bevt_lib.finetune
    small_how --run.init runs/small_joint/model. Ours, no paper row. Not run by us: no number to
    expect (chance: 0.125).
    """
    return replace(small_what(), name="small_how", task="how", flip=False, antisymmetric=1.0)


def paper_dvae() -> config.TrainTokenizer:
    """DALL-E's tokenizer by DALL-E's objective, on your own pictures.

    Paper: its ids are the targets of BEVT's main rows; with OpenAI's two files nothing is to train.
    Command: torchrun on 8 nodes of 8 GPUs with --data.image-root. Of DALL-E's appendix A.2, from
    memory: views of 256 px, batch 512 on 64 GPUs, 3 M steps, AdamW with weight decay 1e-4, the
    rate down a cosine of 1.2 M steps to 1.25e-6, temperature in 150,000 steps, KL weight in 5,000,
    average of the weights at 0.999. ASSUMED: ImageNet-1K in place of its 250 M pictures; its crops
    (short side 256 to 320); bf16 autocast. Not run by us: needs 64 GPUs and ImageNet-1K.
    """
    return config.TrainTokenizer(
        name="paper_dvae",
        data=Data(embedded=False, size=256, short=(256, 320), workers=8, expected_items=1_281_167),
        tokens=Tokens(),
        optim=Optim(lr=1e-4, weight_decay=1e-4, images=512, steps=3_000_000,
                    cosine_steps=1_200_000, last_share=0.0125, ema=0.001),
        temperature_steps=150_000, kl_steps=5_000, quick_start=False, view=256, watch_every=10_000,
        run=Run(save_every=5_000))  # fmt: skip


def paper_peco() -> config.TrainPeco:
    """PeCo's perceptual codebook on ImageNet-1K: 8,192 codes, 16 px an id (never released).

    Paper: its ids are the targets of BEVT's rows SSv2 71.4, K400 81.1. Command: torchrun on 8 GPUs
    with --data.image-root, and --perceptual-weights of a self-supervised ViT-B in timm's names.
    Codebook, moving averages, stride and a self-supervised ViT's features on several levels are the
    paper's, from memory. ASSUMED: everything else (layers, 256 channels a code, blocks 3, 6, 9
    and 12, weights of the terms, batch 256, rate 1e-4, 100 epochs). Not run by us: needs 8 GPUs,
    ImageNet-1K and such a ViT. In BEVT: --tokens.weights FILE, whose factor sizes the view.
    """
    return config.TrainPeco(
        name="paper_peco", data=Data(embedded=False, workers=8, expected_items=1_281_167),
        tokens=Tokens(factor=16),
        optim=Optim(lr=1e-4, images=256, epochs=100, warmup=1, clip_norm=3.0),
        perceptual="vit_base_patch16_224", perceptual_levels=(2, 5, 8, 11), watch_every=5_000,
        run=Run(save_every=5_000))  # fmt: skip


def paper_image() -> Pretrain:
    """Image-stream pretraining of Swin-B on ImageNet-1K, 800 epochs (never released).

    Paper: initialises every row. Command: torchrun on 4 nodes of 8 GPUs with --data.image-root and
    --tokens.weights. Objective, masks, tokenizer and epochs are the paper's; learning rate
    1.5e-3, batch 2048, weight decay 0.05, 10 warm-up epochs, clipping 3, drop path 0.1 and jitter
    0.4 are ASSUMED (BEiT-like). Not run by us.
    """
    return Pretrain(
        name="paper_image", streams=("image",), model=Model(drop_path=0.1),
        data=Data(embedded=False, jitter=0.4, workers=8, expected_items=1_281_167),
        tokens=Tokens(fp16=True),
        optim=Optim(lr=1.5e-3, images=2048, epochs=800, warmup=10, clip_norm=3.0,
                    rules=RELEASED_NO_DECAY))  # fmt: skip


def paper_joint() -> Pretrain:
    """Joint pretraining of Swin-B on Kinetics-400 and ImageNet-1K, 150 epochs (released config).

    Paper: SSv2 70.6, K400 80.6 top-1 after fine-tuning (DALL-E tokens). 32 GPUs: 256 clips and 2048
    images a step; the rate is not scaled with GPUs. ``--run.init`` must name image-stream weights.
    The image path keeps the released quirks, with which the published weights were presumably
    trained. Not run by us: needs 32 GPUs, Kinetics-400 and ImageNet-1K.
    """
    return Pretrain(
        name="paper_joint", streams=("video", "image"), model=Model(released_quirks=True),
        data=Data(embedded=False, jitter=0.4, workers=8, expected_items=240_000),
        tokens=Tokens(fp16=True),
        optim=Optim(lr=5e-4, clips=256, images=2048, epochs=150, warmup=10, clip_norm=3.0,
                    rules=RELEASED_NO_DECAY),
        needs_init=True,
        run=Run(micro_batch=4),  # as released; more where the GPU has room
    )  # fmt: skip


def paper_k400() -> Finetune:
    """Fine-tuning on Kinetics-400, 60 epochs (released config).

    Paper: top-1 80.6 (DALL-E tokens), 81.1 (PeCo). 8 GPUs, 64 clips a step, 4 x 3 test views,
    layer decay 0.9 by the released rules. Not run by us: needs 8 GPUs and Kinetics-400.
    """
    layers: list[str] = []  # from the head down
    for stage, depth in ((3, 2), (2, 18), (1, 2), (0, 2)):
        layers += [f"layers.{stage}.downsample"] if stage < 3 else []
        layers += [f"layers.{stage}.blocks.{block}" for block in reversed(range(depth))]
    layers.append("patch_embed")
    decay = [(f"backbone.{name}", 0.9**power, 1.0) for power, name in enumerate(layers, 1)]
    return Finetune(
        name="paper_k400", task="k400", num_classes=400, model=Model(),
        data=Data(embedded=False, frames=32, interval=2, short=(256, 256), workers=8,
                  expected_items=240_000),
        optim=Optim(lr=3e-4, weight_decay=0.001, clips=64, epochs=60, warmup=2.5, stairs=True,
                    clip_norm=40.0,
                    rules=(*RELEASED_NO_DECAY, ("backbone.norm", 0.9, 0.0), *decay)),
        dropout=0.5, views_at_once=4, val_epochs=5, run=Run(micro_batch=2))  # fmt: skip


def paper_ssv2() -> Finetune:
    """Fine-tuning on Something-Something-V2, 60 epochs (released config).

    Paper: top-1 70.6 (DALL-E tokens), 71.4 (PeCo). Command: torchrun with 8 processes on 8 GPUs,
    --data.video-list, --data.val-list, --data.video-root and the joint weights as --run.init. 64
    clips a step, 32 frames from all over the video, 1 x 3 test views. The backbone learns at a
    tenth of the rate, its bias tables at the full one. The average of the weights moves once a
    step, as far as the released one in the step's 8 micro-iterations. RandAugment is
    torchvision's: APPROXIMATE, see ``augment.rand_augment``. The released config has no flip, but
    imgaug's RandAugment in it flips every second clip; ``--flip`` does so here. Not run by us:
    needs 8 GPUs and Something-Something-V2.
    """
    return Finetune(
        name="paper_ssv2", task="ssv2", num_classes=174,
        model=Model(window=(16, 7, 7), drop_path=0.4),
        data=Data(embedded=False, frames=32, short=(256, 256), workers=8, expected_items=168_913),
        optim=Optim(lr=5e-4, clips=64, epochs=60, warmup=2.5, stairs=True,
                    rules=(*RELEASED_NO_DECAY, ("backbone", 0.1, 1.0)),
                    ema=1 - (1 - 0.0002) ** 8), smoothing=0.1,
        dropout=0.5, flip=False, sampling="uniform", rand_augment=(4, 7), erasing=0.25,
        test_clips=1, views_at_once=2, val_epochs=5, run=Run(micro_batch=1))  # fmt: skip


def paper_diving48() -> Finetune:
    """Fine-tuning on Diving48, 60 epochs (config never released).

    Paper: top-1 86.7 (DALL-E tokens), 87.2 (PeCo). Command and hardware as ``paper_ssv2``: 8 GPUs.
    ASSUMED: everything (batch, rates, epochs, sampling, augmentation without flip, average, test
    views) as for Something-Something-V2, and the corrected labels (V2) with 15,027 training clips.
    Not run by us: needs 8 GPUs and Diving48.
    """
    recipe = paper_ssv2()
    data = replace(recipe.data, expected_items=15_027)
    return replace(recipe, name="paper_diving48", task="diving48", num_classes=48, data=data)


def by_name(*presets: Callable[[], Recipe]) -> dict[str, Callable[[], Recipe]]:
    """Give presets as {name: preset}, in this order."""
    return {preset.__name__: preset for preset in presets}


PRETRAIN = by_name(lesson_image, lesson_joint, small_image, small_joint, paper_image, paper_joint)
FINETUNE = by_name(
    lesson_how, lesson_what, small_how, small_what, paper_k400, paper_ssv2, paper_diving48
)
TRAIN_TOKENIZER = by_name(lesson_dvae, lesson_peco, small_dvae, paper_dvae, paper_peco)
