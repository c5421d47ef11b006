#!/usr/bin/env python3
"""MaskEmbed: locality alignment of vision transformers, the whole method in one file.

Covert et al., "Locality Alignment Improves Vision-Language Models", 2024, arXiv 2410.11087. A ViT
trained on whole images knows what each region holds but does not say it in that region's patch
embedding. A frozen copy f that is shown some patches can speak of those alone. A trainable copy g
sees the whole image; from g's *visible* patch embeddings a small decoder h must tell what f said:

    min over g, h of  E || h(m * g(x)) - s f(m * x) ||^2       (mean over tokens and channels)

To succeed for every mask m, each embedding must carry what its own patch contributes.

    paper  here               shape         B images, K masks of each, N patches, P prefix tokens
    x      images             (B, C, H, W)  (class, registers), T = P + N tokens, D channels, E the
    m      masks              (B, K, N)     decoder's width (D unless chosen otherwise).
    f      Teacher            (B, K, T, D)
    g      MaskEmbed.encoder  (B, T, E)     A mask is 1 where a patch is visible and 0 where it is
    h      MaskEmbed.decoder  (B, K, T, D)  hidden, and `keep` is the visible share, everywhere.
    s      Teacher.scale      scalar        s = 1 / standard deviation of the targets

    python maskembed.py --demo                                               # 3 minutes, a laptop
    python maskembed.py --data DIR --batch-size 256 --accum 4                # one GPU
    torchrun --nproc-per-node=8 maskembed.py --data DIR --batch-size 128     # eight GPUs
"""
import argparse, collections, contextlib, copy, difflib, functools, itertools, json, math, os
import pickle, random, re, signal, sys, time, zlib
from pathlib import Path

import huggingface_hub
import numpy as np
import safetensors.torch
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from timm.data import Mixup, create_dataset, create_transform, resolve_model_data_config
from timm.layers import Mlp, PatchEmbed, use_fused_attn
from timm.models import Beit, Eva, VisionTransformer, checkpoint_seq
from timm.models._hub import save_config_for_hf
from timm.models.vision_transformer import Attention, Block
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

if torch.__version__ >= (2, 7):  # before, it takes not every head dim, nor DDP
    from torch.nn.attention.flex_attention import flex_attention
else:
    flex_attention = None

MASKS = ("uniform", "bernoulli", "blockwise")
LOSSES = ("mse", "l1", "cosine", "masked", "unmasked")


class InputError(ValueError):
    """What was passed cannot be used; the text names it and says what to do about it."""


def require(condition, message):
    """Raises InputError(message) unless the condition holds."""
    if not condition:
        raise InputError(message)


# ---- masks ---------------------------------------------------------------------------------------
def sample_masks(batch_size, num_patches, kind="uniform", keep=0.5, complement=True, full=True,
                 generator=None, device=None):
    """Draws masks m -> float (B, K, N), 1 = visible, K in {1, 2, 3}: drawn, complement, full.

    One mask is drawn per image; `complement` adds 1 - m (antithetical), `full` the mask of ones.
    "uniform": every number of visible patches, 0..N, is as likely; "bernoulli": each patch is
    visible with probability keep; "blockwise": rectangles until keep * N are visible. Drawn on
    `device` (default: the generator's); the same generator state gives the same masks.
    Raises ValueError for an unknown kind, an empty batch or grid, or keep not in 0..1.
    """
    require(min(batch_size, num_patches) > 0, f"no masks for {batch_size} x {num_patches} patches")
    require(kind in MASKS, f"unknown mask kind {kind!r}: choose one of {', '.join(MASKS)}")
    require(0 <= keep <= 1, f"keep is the share of visible patches, 0 to 1, not {keep}")
    device = device or (generator.device if generator else None)
    fits = not generator or generator.device.type == torch.device(device).type
    require(fits, f"a generator on {generator and generator.device} cannot draw masks on {device}")
    rand = functools.partial(torch.rand, generator=generator, device=device)
    if kind == "uniform":
        drawn = rand(batch_size, num_patches) > rand(batch_size, 1)  # u_i > u
    elif kind == "bernoulli":
        drawn = rand(batch_size, num_patches) < keep
    else:
        drawn = _rectangles(batch_size, num_patches, keep, rand)
    m = drawn.float()  # (B, N)
    return torch.stack([m] + [1 - m] * complement + [torch.ones_like(m)] * full, dim=1)  # (B, K, N)


def _rectangles(batch_size, num_patches, keep, rand, count=32):
    """Random rectangles become visible in turn until ceil(keep * N) patches are -> bool (B, N).

    Each covers about 16 to keep * N patches, aspect ratio 0.3 to 1/0.3; the last is cut short, row
    by row. All are drawn at once, so that nothing has to be read back from the device.
    """
    rows = max(r for r in range(1, math.isqrt(num_patches) + 1) if num_patches % r == 0)
    columns = num_patches // rows  # a square where N is one
    largest = keep * num_patches
    smallest = min(16, largest)
    u = rand(4, batch_size, count, 1)  # area, aspect ratio, top, left of every rectangle
    area, aspect = smallest + (largest - smallest) * u[0], 0.3 ** (2 * u[1] - 1)
    height = (area * aspect).sqrt().round().clamp(1, rows)
    width = (area / aspect).sqrt().round().clamp(1, columns)
    top, left = (u[2] * (rows - height + 1)).floor(), (u[3] * (columns - width + 1)).floor()
    index = torch.arange(num_patches, device=u.device)
    y, x = index // columns - top, index % columns - left  # (B, count, N): place in each rectangle
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    # Patches in the order in which they become visible; those of a turn, or of none, row by row.
    first = (~inside).cumprod(dim=1).sum(dim=1)  # (B, N): the turn of each patch, else count
    scan = torch.where(rand(batch_size, 1) < 0.5, index, num_patches - 1 - index)  # or upwards
    rank = (first * num_patches + scan).argsort(dim=1).argsort(dim=1)
    return rank < math.ceil(largest - 1e-6)  # 1e-6: 0.7 * 10 is a little over 7


def mask_pixels(images, masks, patch_size):
    """m * x, by definition: hidden patches are 0 after normalisation, which is the mean colour.

    images (B, C, H, W), masks (B, K, N) -> (B, K, C, H, W); patch_size is an int or a pair. Pixels
    beyond the last whole patch are hidden: no patch sees them. ValueError if N is another grid's.
    """
    p, q = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    height, width = images.shape[2:] if images.ndim == 4 else (0, 0)
    rows, columns = (height // p, width // q) if min(p, q) > 0 else (0, 0)
    fits = masks.ndim == 3 and masks.shape[::2] == (*images.shape[:1], rows * columns)
    require(fits and masks.numel() > 0 < images.numel() and images.device == masks.device,
            f"images {tuple(images.shape)} on {images.device}, in patches of {p} x {q} a {rows} x "
            f"{columns} grid, do not go with masks {tuple(masks.shape)} on {masks.device}")
    pixels = masks.unflatten(2, (rows, columns)).repeat_interleave(p, 2).repeat_interleave(q, 3)
    pixels = F.pad(pixels, (0, width - columns * q, 0, height - rows * p))  # (B, K, H, W)
    return images[:, None] * pixels[:, :, None]


def _check_batch(images, masks, embed):
    shape, like = (embed.proj.in_channels, *embed.img_size), embed.proj.weight
    fits = images.shape[1:] == shape and masks.ndim == 3 and masks.shape[2] == embed.num_patches
    kinds = images.dtype == like.dtype and masks.is_floating_point()
    places = images.device == masks.device == like.device
    require(fits and kinds and places and len(images) == len(masks) and masks.numel() > 0,
            f"need B > 0 images {shape} {like.dtype} and float masks (K > 0, {embed.num_patches}) "
            f"of each, on {like.device}, not {tuple(images.shape)} {images.dtype} {images.device} "
            f"and {tuple(masks.shape)} {masks.dtype} {masks.device}")
    if masks.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere it would wait
        require((masks == masks.bool()).all(), f"masks {tuple(masks.shape)} not of 0 and 1 alone")


# ---- teacher -------------------------------------------------------------------------------------
def _compile_blocks(model, *args, **options):
    """nn.Module.compile, but block by block: what is compiled for one serves them all."""
    for block in [module for module in model.modules() if hasattr(module, "attn")]:
        block.compile(*args, **options)


def _choose_attention(blocks, device):
    """timm's fused attention, but for bfloat16 on a CPU, where matrix products are faster."""
    fused = use_fused_attn() and (device.type != "cpu" or not torch.is_autocast_enabled("cpu"))
    for block in blocks:
        if block.attn.fused_attn != fused:
            block.attn.fused_attn = fused


def _trunk(vit, prefix_only=False):
    """A copy of a timm ViT without pooling and head: all tokens come out, every weight is used."""
    plain = (isinstance(vit, (VisionTransformer, Beit, Eva)) and hasattr(vit.blocks[0], "attn")
             and isinstance(vit.patch_embed, PatchEmbed) and not hasattr(vit, "head_dist")
             and all(isinstance(n, (nn.LayerNorm, nn.Identity)) for n in (vit.norm, vit.fc_norm)))
    require(plain, f"this {type(vit).__name__} is no plain ViT: choose a timm VisionTransformer, "
            "Beit or Eva, ending in a LayerNorm, without parallel blocks, convolutions, distilling")
    prefix, patches = vit.num_prefix_tokens, vit.patch_embed.num_patches
    require(not prefix_only or 0 < prefix < patches, f"prefix_only: this ViT has {prefix} prefix "
            f"tokens, {patches} patches")
    vit = copy.deepcopy(vit)
    vit.reset_classifier(0, global_pool="")
    vit.attn_pool = None
    return vit


class Teacher(nn.Module):
    """f: the frozen ViT looks at masked images. teacher(images, masks) -> s f(m * x), (B, K, T, D).

    vit: a plain timm VisionTransformer, Beit or Eva; it is copied, the copy has no gradients, stays
    in eval mode and lacks the last `skip_blocks` blocks. prefix_only: (B, K, P, D), prefix tokens
    alone. Buffer `scale`: s, 1 until somebody measures it. Raises ValueError for another model (or
    one without prefix tokens, if asked for), skip_blocks out of range, shapes that do not fit.
    """

    def __init__(self, vit, skip_blocks=1, prefix_only=False):
        super().__init__()
        self.vit = _trunk(vit, prefix_only).requires_grad_(False)
        self.predicted = slice(0, vit.num_prefix_tokens if prefix_only else None)  # which tokens
        kept = len(vit.blocks) - skip_blocks
        require(0 < kept <= len(vit.blocks), f"skip_blocks {skip_blocks} of "
                f"{len(vit.blocks)} blocks: choose 0 or more, fewer than all")
        self.vit.blocks = self.vit.blocks[:kept]
        # forward() embeds and masks the patches; what is left of the ViT starts from there. (Its
        # _pos_embed still reads grid_size, where the model has dynamic_img_size.)
        self.patch_embed, self.vit.patch_embed = self.vit.patch_embed, nn.Identity()
        self.vit.patch_embed.grid_size = self.patch_embed.grid_size
        self.num_patches = self.patch_embed.num_patches
        self.register_buffer("scale", torch.ones(()))
        self.train()

    compile = _compile_blocks

    def train(self, mode=True):
        return super().train(False)

    def forward(self, images, masks):
        return self.tokens(images, masks)[:, :, self.predicted] * self.scale

    @torch.inference_mode()
    def tokens(self, images, masks):
        """f(m * x), all tokens, (B, K, T, D)."""
        _check_batch(images, masks, self.patch_embed)
        _choose_attention(self.vit.blocks, images.device)
        # A patch embedding is a strided convolution, it sees one patch at a time: so embed every
        # image once and put a blank patch's embedding where m is 0. As mask_pixels does.
        embed = self.patch_embed
        x = embed(images)  # (B, N, D), or (B, rows, columns, D) if dynamic_img_size
        blank = embed.norm(embed.proj(torch.zeros_like(embed.proj.weight[:1])).flatten())  # (D,)
        visible = masks.bool().view(*masks.shape[:2], *x.shape[1:-1], 1)
        # One mask after the other: less memory at a time, which on a CPU is also faster.
        views = [self.vit(torch.where(visible[:, k], x, blank)) for k in range(masks.shape[1])]
        return torch.stack(views, dim=1)  # (B, K, T, D)


# ---- encoder and decoder -------------------------------------------------------------------------
class SoftcapAttention(Attention):
    """timm's Attention with its logits a replaced by c tanh(a / c), c = self.softcap."""

    def forward(self, x, **_):  # timm's attn_mask and is_causal: never set here
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        fused = flex_attention and x.is_cuda and torch.compiler.is_compiling()
        if fused and v.dtype != torch.float32 and not self.attn_drop.p:
            x = self.fused(q, k, v)
        else:
            a = ((q * (self.scale / self.softcap)) @ k.mT).tanh_()  # (B, heads, T, T)
            a = (self.softcap * a).softmax(dim=-1, dtype=a.dtype)  # autocast would choose float32
            x = self.attn_drop(a) @ v
        return self.proj_drop(self.proj(self.norm(x.transpose(1, 2).flatten(2))))

    def fused(self, q, k, v):
        """The same in one kernel, where it is compiled: the logits never reach the memory."""
        def capped(logit, *_):
            return self.softcap * torch.tanh(logit / self.softcap)
        return flex_attention(q.to(v.dtype), k.to(v.dtype), v, score_mod=capped, scale=self.scale)


class Decoder(nn.Module):
    """h: tokens (B, T, E), masks (B, K, N) -> (B, K, T, D); its blocks resemble the encoder's."""

    def __init__(self, encoder, width, layers):
        super().__init__()
        attn, mlp = encoder.blocks[0].attn, encoder.blocks[0].mlp
        require(width > 0 and width % attn.num_heads == 0, f"{attn.num_heads} heads do not divide "
                f"decoder_width {width}")
        plain = isinstance(attn, Attention)  # else Beit, Eva: bias, no qk norm
        norm = functools.partial(nn.LayerNorm, eps=1e-5)
        self.num_prefix = encoder.num_prefix_tokens
        num_tokens = self.num_prefix + encoder.patch_embed.num_patches
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, num_tokens, width))
        self.blocks = nn.Sequential(*[Block(
            width, attn.num_heads, mlp_ratio=4.0, qkv_bias=not plain or attn.qkv.bias is not None,
            qk_norm=plain and not isinstance(attn.q_norm, nn.Identity), init_values=1e-6,
            act_layer=type(mlp.act), mlp_layer=type(mlp), norm_layer=norm) for _ in range(layers)])
        self.norm = norm(width)
        self.head = nn.Linear(width, encoder.embed_dim)
        self.grad_checkpointing = False

    def forward(self, tokens, masks):
        visible = F.pad(masks, (self.num_prefix, 0)).to(tokens.dtype)[..., None]  # prefix: hidden
        # (B, K, T, E): hidden tokens become pos_embed alone
        x = torch.addcmul(self.pos_embed, tokens[:, None], visible).flatten(0, 1)
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        return self.head(self.norm(x)).unflatten(0, masks.shape[:2])  # (B, K, T, D)


class MaskEmbed(nn.Module):
    """g and h, the trained part: model(images, masks) -> h(m * g(x)), (B, K, T, D).

    vit: a plain timm VisionTransformer, Beit or Eva; a copy becomes `.encoder`, under timm's keys
    plus `head.*`, with a fresh final norm and soft-capped attention (softcap=0: plain, the only
    choice for Beit and Eva). head: "linear" or "mlp", D -> decoder width, zero at the start.
    prefix_only: (B, K, P, D). Raises ValueError for arguments or shapes that do not fit.
    """

    def __init__(self, vit, softcap=30.0, head="linear", decoder_layers=2, decoder_width=None,
                 prefix_only=False):
        super().__init__()
        require(0 <= softcap < math.inf, f"softcap must be positive, or 0 for none, not {softcap}")
        require(head in ("linear", "mlp"), f"unknown head {head!r}: choose linear or mlp")
        require(decoder_layers > 0, f"decoder_layers must be 1 or more, not {decoder_layers}")
        self.encoder = encoder = _trunk(vit, prefix_only).requires_grad_(True).train()
        self.predicted = slice(0, vit.num_prefix_tokens if prefix_only else None)
        for block in encoder.blocks if softcap else ():
            known = type(block.attn) is Attention and getattr(block.attn, "gate", None) is None
            require(known, f"no soft cap for {type(vit).__name__}'s attention: choose softcap 0")
            block.attn.__class__ = SoftcapAttention  # the same weights and keys, another forward
            block.attn.softcap = softcap
        for name in ("norm", "fc_norm"):
            if not isinstance(getattr(encoder, name), nn.Identity):
                setattr(encoder, name, nn.LayerNorm(vit.embed_dim, eps=1e-5))
        dim, width, mlp = vit.embed_dim, decoder_width or vit.embed_dim, encoder.blocks[0].mlp
        encoder.head = nn.Linear(dim, width) if head == "linear" else Mlp(
            dim, mlp.fc2.in_features, width, act_layer=type(mlp.act))
        for parameter in (encoder.head if head == "linear" else encoder.head.fc2).parameters():
            nn.init.zeros_(parameter)
        self.decoder = Decoder(encoder, width, decoder_layers)
        self.to(next(vit.parameters()))  # its device and dtype

    compile = _compile_blocks

    def set_grad_checkpointing(self, enable=True):
        """Blocks are computed again in the backward pass, instead of keeping what it needs."""
        self.encoder.set_grad_checkpointing(enable)
        self.decoder.grad_checkpointing = enable

    def forward(self, images, masks):
        _check_batch(images, masks, self.encoder.patch_embed)
        _choose_attention([*self.encoder.blocks, *self.decoder.blocks], images.device)
        tokens = self.encoder(images)  # (B, T, E), once for all masks
        return self.decoder(tokens, masks)[:, :, self.predicted]


# ---- loss ----------------------------------------------------------------------------------------
def reconstruction_loss(prediction, target, masks, kind="mse"):
    """|| h(m * g(x)) - s f(m * x) ||^2 and variants of it: (B, K, T, D) twice, (B, K, N) -> scalar.

    "mse", "l1"; "cosine": 1 - mean cosine over tokens; "masked", "unmasked": squared error of
    hidden or visible patches, and of prefix tokens, mean over all entries. Raises ValueError for an
    unknown kind and for shapes that differ (they would broadcast in silence).
    """
    require(kind in LOSSES, f"unknown loss {kind!r}: choose one of {', '.join(LOSSES)}")
    shapes = tuple(prediction.shape), tuple(target.shape), tuple(masks.shape)
    kinds = all(x.is_floating_point() and x.device == masks.device for x in (prediction, target))
    fits = shapes[0] == shapes[1] and shapes[1][:2] == shapes[2][:2] and target.numel() > 0
    require(fits and kinds and masks.is_floating_point() and (target.ndim, masks.ndim) == (4, 3),
            "need prediction and target (B, K, T, D) and masks (B, K, N), all float, on one "
            "device, not {}, {} and {}".format(*shapes))
    if kind == "mse":
        return F.mse_loss(prediction, target)
    if kind == "l1":
        return F.l1_loss(prediction, target)
    if kind == "cosine":
        return 1 - F.cosine_similarity(prediction, target, dim=-1).mean()
    weight = torch.ones_like(target[..., 0])  # (B, K, T); stays 1 for prefix tokens
    if target.shape[2] >= masks.shape[2]:  # else prefix_only
        weight[..., -masks.shape[2]:] = 1 - masks if kind == "masked" else masks
    return (weight[..., None] * (prediction - target) ** 2).mean()


# ---- data ----------------------------------------------------------------------------------------
LETTERS = "ACEHKSTX"


class Letters:
    """`count` built-in images, by index and seed alone: [i] -> (image, ink), PIL, size x size.

    image, RGB: 1 to 4 letters in strong colours on smooth soft noise, each in a cell of a 3 x 3
    grid, a little rotated. ink, L: 1 + the letter's place in LETTERS where there is one, else 0.
    """

    def __init__(self, count, size=48, seed=0):
        self.count, self.size, self.seed = count, size, seed

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        index = range(self.count)[index]  # or IndexError
        rng, shape = random.Random(f"{self.seed} {index}"), (self.size, self.size)
        noise = Image.frombytes("RGB", (6, 6), bytes(64 + b // 2 for b in rng.randbytes(108)))
        image, ink = noise.resize(shape, Image.BICUBIC), Image.new("L", shape)
        cell, font = max(1, self.size // 3), ImageFont.load_default(size=max(1, 0.376 * self.size))
        for place in rng.sample(range(9), rng.randint(1, 4)):
            letter, corner = rng.randrange(len(LETTERS)), (place % 3 * cell, place // 3 * cell)
            glyph, middle = Image.new("L", (cell, cell)), (cell / 2, cell / 2)
            ImageDraw.Draw(glyph).text(middle, LETTERS[letter], 255, font, anchor="mm")
            glyph = glyph.rotate(rng.uniform(-15, 15), Image.BICUBIC)
            image.paste(tuple(255 * (b > 127) for b in rng.randbytes(3)), corner, glyph)
            ink.paste(letter + 1, corner, glyph.point(lambda value: 255 * (value > 127)))
        return image, ink


def patch_labels(ink, patch_size):
    """Letters' ink (n, H, W), as integers -> (n, N): the letter that covers most of each patch.

    0 is background: less than a sixteenth of the patch is one letter's.
    """
    pixels = ink.unfold(1, patch_size, patch_size).unfold(2, patch_size, patch_size).flatten(3)
    counts = [(pixels == letter + 1).sum(3).flatten(1) for letter in range(len(LETTERS))]
    most, letter = torch.stack(counts, dim=2).max(dim=2)  # (n, N) each
    return torch.where(most * 16 >= patch_size ** 2, letter + 1, 0)


@contextlib.contextmanager
def explaining(what):
    """Turns whatever fails inside into an InputError that begins with `what`."""
    try:
        yield
    except InputError:  # says it all already
        raise
    except Exception as error:
        raise InputError(f"{what}: {' '.join(str(error).split())[:300]}") from error


def find_images(folder):
    """Paths of all images in a folder and the folders in it, sorted, as an array of bytes, which
    forked workers share as no list is shared. Loops of links do no harm."""
    files, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=skipped):
        folders.sort()
        if os.path.realpath(place) in seen:  # a link has led to where we were before
            folders.clear()
        else:
            seen.add(os.path.realpath(place))
            files += [os.path.join(place, name) for name in sorted(names)
                      if name.lower().endswith((*IMG_EXTENSIONS, ".gif"))]
    return np.array([os.fsencode(name) for name in files])


def skipped(problem):
    """Names on stderr what could not be read."""
    tqdm.write(f"skipped {problem}".encode(errors="replace").decode(), file=sys.stderr)


def read_image(data, index):
    """Image `index` of an array of paths, Letters, or a timm or torchvision data set, in RGB.

    Raises ValueError with its name if it is broken, too large for Pillow, or too long for a crop.
    """
    name = source = os.fsdecode(data[index]) if isinstance(data, np.ndarray) else None
    try:
        if hasattr(data, "reader"):  # past timm's data[index], which hides broken files
            name, source = data.reader.filename(index), data.reader[index][0]
        image = Image.open(source) if source else data[index][0]
        require(max(image.size) <= 100 * min(image.size), "too long: {} x {} pixels"
                .format(*image.size))
        if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip to white
            image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")
    except Exception as error:
        raise InputError(f"{name or f'image {index}'}: {error!r}") from error


def seed_of(*key):
    """32 bits from (seed, epoch, place...): the same however often a run is stopped or spread."""
    return zlib.crc32(repr(key).encode())


class Images(torch.utils.data.Dataset):
    """[epoch, i] (to validate on: [i]) -> (float (3, H, W), "", number tried, seconds).

    The same for the same seed and key. read(indices[i]) is a PIL image; for one that cannot be read
    comes another, and the text says what was wrong. mix: timm's Mixup, each with another, or None.
    `spent` counts the images taken, the seconds that reading and that waiting for them took.
    """

    def __init__(self, read, indices, transform, seed=0, mix=None):
        self.read, self.indices, self.transform = read, indices, transform
        self.seed, self.mix, self.named, self.spent = seed, mix, set(), collections.Counter()

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, key):
        began, found, problem, seed = time.perf_counter(), [], "", seed_of(self.seed, *key)
        others = random.Random(seed).choices(range(len(self)), k=20)
        for tried, i in enumerate([key[-1], *others], 1):
            for generator in (random.seed, np.random.seed, torch.default_generator.manual_seed):
                generator((seed + tried) % 2 ** 32)  # not torch.manual_seed: workers have no CUDA
            try:
                found.append(self.transform(self.read(self.indices[i])))
            except Exception as error:
                problem = problem or str(error) or repr(error)
            if len(found) == (2 if self.mix else 1):
                if self.mix:
                    found = self.mix(torch.stack(found), torch.zeros(2, dtype=torch.long))[0]
                return found[0], problem, tried, time.perf_counter() - began
        raise InputError(f"21 images in turn cannot be read, first {problem}")


def open_images(args, vit):
    """args.data, or built-in images, as Images to train on and to validate on, made for `vit`.

    A folder that holds train/ and val/ is split so. Else one image in a hundred is held out, the
    same ones every time: a global batch at least, half at most. ValueError where too few are left.
    """
    path, size, config = args.data, vit.patch_embed.img_size, resolve_model_data_config(vit)
    if path is None:
        sets = [Letters(args.num_images, max(size), args.seed)]
    elif os.path.isdir(path):
        splits = [f"{path}/train", f"{path}/val"]
        sets = list(map(find_images, splits if all(map(os.path.isdir, splits)) else [path]))
    else:
        tar = os.path.isfile(path) and path.endswith(".tar")
        require(tar or path.startswith(("torch/", "hfds/")), f"--data {path}: no such folder or "
                "tar, and of timm's data sets only torch/... and hfds/... can be indexed")
        timm.data.add_img_extensions((*IMG_EXTENSIONS, ".gif"))  # of a tar's members
        with explaining(f"--data {path}"):  # of an open tar file, no two workers could read
            sets = [timm.data.ImageDataset(path, cache_tarfiles=False, cache_tarinfo=False) if tar
                    else create_dataset(path, f"{torch.hub.get_dir()}/datasets", "train",
                                        download=True)]
    require(all(map(len, sets)), f"--data {path}: no images in it, or in its train/ or its val/")
    train, val, window = np.arange(len(sets[0])), np.arange(len(sets[-1])), args.global_batch
    if len(sets) == 1:
        n, wanted = len(train), max(len(train) // 100, window)
        held_out = max(1, min(wanted, n // 2, n - window))  # but leave a global batch to train on
        val = np.arange(held_out) * n // held_out  # evenly spread
        train = np.delete(train, val)
    require(len(train) >= window, f"{len(train)} images to train on are fewer than a global batch, "
            f"{window} (processes x --batch-size x --accum): lower --batch-size")
    transform = functools.partial(create_transform, size, mean=config["mean"], std=config["std"])
    with explaining(f"--auto-augment {args.auto_augment}"):
        augment = transform(
            is_training=True, train_crop_mode="rkrc", scale=(0.08, 1), ratio=(3 / 4, 4 / 3),
            hflip=0.5, color_jitter=None, interpolation="random", auto_augment=args.auto_augment)
    plain = transform(**{name: config[name] for name in ("interpolation", "crop_pct", "crop_mode")})
    mix = Mixup(args.mixup, args.cutmix, num_classes=1) if args.mixup or args.cutmix else None
    read, read_val = (functools.partial(read_image, data) for data in (sets[0], sets[-1]))
    return Images(read, train, augment, args.seed, mix), Images(read_val, val, plain, args.seed)


def training_order(count, epoch, args, process):
    """What this rank takes up in an epoch -> long (micro-batches, batch size), places in the data.

    Every epoch has an order of its own; its last update is filled up with its first images. An
    update is the same images whatever the numbers of processes and of micro-batches are.
    """
    shuffle = torch.Generator().manual_seed(seed_of(args.seed, epoch))
    updates = math.ceil(count / args.global_batch)
    order = torch.randperm(count, generator=shuffle)
    order = order[torch.arange(updates * args.global_batch) % count]
    return order.view(-1, args.batch_size, process.world)[:, :, process.rank]


def load(data, order, key, num_patches, args, process, start=0):
    """Yields this rank's micro-batches, images (b, 3, H, W) and masks (b, K, N), on the device.

    order: for each, from number `start` on, the places of its images. The masks of an update
    (`accum` micro-batches on all ranks) are drawn together, seeded by `key` and its number: it does
    not matter who computes what. Broken images are named, once; ValueError if most of them are.
    Close it after use: or a program that fails waits for ever for workers, which ignore signals.
    """
    loader = torch.utils.data.DataLoader(
        data, batch_sampler=([(*key, int(i)) for i in places] for places in order),
        num_workers=args.workers, worker_init_fn=ignore_signals,
        pin_memory=process.device.type == "cuda")
    data.spent.clear()
    good, seen, began = 0, 0, time.perf_counter()
    for number, (images, problems, tried, seconds) in enumerate(loader, start):
        data.spent.update(images=len(images), work=seconds.sum().item() / max(1, args.workers),
                          wait=time.perf_counter() - began)
        for problem in {*problems} - {""} - data.named:
            skipped(problem)
            data.named.add(problem)
        good, seen = good + len(images) * (2 if data.mix else 1), seen + tried.sum().item()
        require(seen - good <= max(16, seen / 2), f"{seen - good} of {seen} images are broken, "
                f"such as {[*filter(None, problems)]}")
        step, micro = divmod(number, args.accum)
        generator = torch.Generator(process.device).manual_seed(seed_of(args.seed, *key, step))
        masks = sample_masks(args.global_batch, num_patches, args.mask_kind, args.keep,
                             args.complement, args.full, generator)
        masks = masks.view(args.accum, args.batch_size, process.world, *masks.shape[1:])
        images = images.to(process.device, non_blocking=True)
        yield images, masks[micro, :len(images), process.rank]
        began = time.perf_counter()


def ignore_signals(_):
    """In workers that read images: their parent says what is to be done about a signal."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


# ---- processes and device ------------------------------------------------------------------------
Process = collections.namedtuple("Process", "rank world device dtype autocast stop")


def start_process(dtype="auto"):
    """Joins the others where torchrun started this process; finds cuda, else mps, else the cpu.

    dtype "auto": bfloat16 where the device computes in it, else float16 on cuda, else float32.
    Returns Process(rank, world: how many, device, dtype, autocast: context of matrix products,
    stop: a list, which a signal to end the run goes into, see stopping).
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, cuda = torch.device("cpu"), torch.cuda.is_available()
    bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()  # torch 2.4: not there
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        with explaining(f"no {device} for process {rank}: lower --nproc-per-node"):
            torch.cuda.set_device(device)
        bf16 = torch.cuda.get_device_capability() >= (8, 0)
    elif torch.backends.mps.is_available() and world == 1:
        device, bf16 = torch.device("mps"), False
    if dtype == "auto":
        dtype = "bfloat16" if bf16 else "float16" if cuda else "float32"
    fits = {"float16": ["cuda"], "bfloat16": ["cuda", "cpu"]}.get(dtype, [device.type])
    require(device.type in fits, f"--dtype {dtype} is not for {device.type}")
    if "RANK" in os.environ and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    autocast = functools.partial(torch.autocast, "cuda" if cuda else "cpu", getattr(torch, dtype),
                                 enabled=dtype != "float32")
    return Process(rank, world, device, getattr(torch, dtype), autocast, [])


def all_ranks(process, value):
    """Waits for all ranks -> the list of their values (anything that pickles), by the CPU alone."""
    values = [value] * process.world
    if process.world > 1:
        torch.distributed.all_gather_object(values, value)
    return values


class Stopped(Exception):
    """SIGTERM or Ctrl-C came, and all processes have agreed to end here, between two updates."""


def go_on(process):
    """Returns if no rank has got a signal to stop, else raises Stopped, on every rank."""
    if any(all_ranks(process, len(process.stop))):
        raise Stopped("before the first step")


@contextlib.contextmanager
def stopping(stop):
    """In this context SIGTERM and Ctrl-C go into the list `stop`; a second Ctrl-C is the end."""
    def handler(number, _):
        stop.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    with contextlib.ExitStack() as after:
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.signal(number, handler)
            after.callback(signal.signal, number, before)
        yield


# ---- checkpoints ---------------------------------------------------------------------------------
def write_file(path, data):
    """Writes bytes, or what torch.save takes; at any time `path` is whole, the old or the new."""
    with explaining(f"cannot write {path} (what was there is still there)"):
        with open(f"{path}.tmp", "wb") as file:
            file.write(data) if isinstance(data, bytes) else torch.save(data, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)


def read_file(path):
    """A checkpoint as a dict. Code that a file may hold is never run; ValueError if unreadable."""
    torch.serialization.add_safe_globals([argparse.Namespace])  # in the authors' files, and inert
    with explaining(f"cannot read {path}"):
        if os.path.isdir(path):  # timm's hub layout
            config = json.loads(Path(path, "config.json").read_text())
            about = {"model": config["architecture"], **config.get("maskembed", {})}
            return {"model": read_file(Path(path, "model.safetensors")), "args": about}
        if str(path).endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        try:
            return dict(torch.load(path, map_location="cpu", weights_only=True))
        except pickle.UnpicklingError:  # its text tells how to run the file's code all the same
            raise InputError(f"{path}: this is no checkpoint, or it holds code, which is not run")


def start_folder(args, saved=None):
    """Makes args.out ready: the settings, and the log as long as it was when `saved` was saved."""
    with explaining(f"cannot write to --out {args.out}"):
        os.makedirs(args.out, exist_ok=True)
        for name in ("last.pt", "best.pt", "encoder/model.safetensors", "encoder/config.json"):
            Path(args.out, f"{name}.tmp").unlink(missing_ok=True)  # a killed run has left it
        write_file(f"{args.out}/args.json", json.dumps(vars(args), indent=1).encode())
        with open(f"{args.out}/log.jsonl", "a") as log:
            log.truncate(min(saved["log"] if saved else 0, log.tell()))


def load_weights(vit, saved, path):
    """Loads a checkpoint's encoder, or bare ViT, strictly but for pooling and head; or ValueError.

    saved: what read_file returns: ours, the authors' or timm's, with or without wrappers' prefixes.
    """
    with explaining(f"{path} does not fit the model"):
        state = saved.get("model", saved.get("state_dict", saved))
        state = {re.sub(r"\b(module|_orig_mod)\.", "", k): v for k, v in state.items()}
        state = {k[8:]: v for k, v in state.items() if k.startswith("encoder.")} or state
        norm = "norm." if isinstance(vit.fc_norm, nn.Identity) else "fc_norm."  # pooling decides
        vit.load_state_dict({re.sub(r"^(fc_)?norm\.", norm, k): v for k, v in state.items()
                             if not k.startswith(("head", "attn_pool."))})


def load_vit(name, pretrained=True, img_size=None, checkpoint=None):
    """The ViT to align, no pooling: weights from timm's hub, from a checkpoint file, or random.

    Raises ValueError for a name unknown to timm (with the nearest), for what is no ViT, and, within
    seconds, where the weights are not cached and the hub cannot be reached.
    """
    vits = timm.list_models(["vit_*", "deit*", "beit*", "eva*"])
    near = difflib.get_close_matches(name.split(".")[0], vits, 3, cutoff=0)
    require(timm.is_model(name), f"unknown model {name}: did you mean {', '.join(near)}?")
    with explaining(f"cannot load {name}"):
        _trunk(timm.create_model(name))  # is it a ViT? Before anything is downloaded
    pretrained = pretrained and not checkpoint
    if pretrained:
        try:  # the hub's client retries for a minute, unless told that it is offline
            huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
        except Exception:
            huggingface_hub.constants.HF_HUB_OFFLINE = True
    with explaining(f"cannot load {name}, pass --checkpoint FILE (or --no-pretrained, to try)"):
        vit = _trunk(timm.create_model(name, pretrained, num_classes=0, img_size=img_size))
    with explaining(f"--img-size {img_size}"):  # less than a patch; or timm wants whole patches
        vit.patch_embed(torch.zeros(1, 3, *vit.patch_embed.img_size))
    if checkpoint:
        load_weights(vit, read_file(checkpoint), checkpoint)
    return vit


def load_aligned(path, model=None):
    """An aligned encoder as a timm ViT in eval mode: vit(images) -> all tokens (B, T, D), normed.

    path: last.pt, best.pt or encoder/ of a run, or a checkpoint of the authors' code.
    model: a timm name, where the file does not say it; names svit_... are the authors' for vit_...
    with a soft cap of 30, which is built in here. Raises ValueError if anything does not fit.
    """
    saved = read_file(path)
    args = saved.get("args") or {}
    args = args if isinstance(args, dict) else vars(args)
    name = model or args.get("model") or saved.get("arch")
    require(name, f"{path} does not say what model it is: pass model=, a timm name")
    capped = any(str(n).startswith("svit_") for n in (name, args.get("model"), saved.get("arch")))
    softcap = args.get("softcap", 30.0 if capped else 0.0)
    vit = load_vit(re.sub("^svit_", "vit_", name), pretrained=False, img_size=args.get("img_size"))
    vit = MaskEmbed(vit, softcap=softcap, decoder_layers=1).encoder
    vit.head = nn.Identity()
    load_weights(vit, saved, path)
    return vit.eval()


# ---- training ------------------------------------------------------------------------------------
def learning_rate(step, total, warmup, lr, min_lr):
    """Linear from min_lr to lr in `warmup` updates, then a cosine back to min_lr at `total`."""
    if step < warmup:
        return min_lr + (lr - min_lr) * step / warmup
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


@torch.no_grad()
def evaluate(function, data, num_patches, args, process):
    """Means of the scalars that function(images, masks) lists, over `data` and all ranks: each
    image once, under the same masks every time -> float64 (number of scalars,). Raises Stopped."""
    places, rows = range(process.rank, len(data), process.world), []  # this rank's
    order = [places[i:i + args.batch_size] for i in range(0, len(places), args.batch_size)]
    with contextlib.closing(load(data, order, (), num_patches, args, process)) as batches:
        for _ in range(0, len(data), args.global_batch):
            go_on(process)
            for images, masks in itertools.islice(batches, args.accum):
                with process.autocast():
                    rows.append((len(images), *function(images, masks)))
    rows = [[float(value) for value in row] for row in rows]  # read when all of it is under way
    rows = torch.tensor(sum(all_ranks(process, rows), []), dtype=torch.float64)
    return (rows[:, :1] * rows[:, 1:]).sum(dim=0) / rows[:, 0].sum()


def measure_scale(teacher, data, args, process):
    """Sets s = 1 / std of all target entries, over images, masks, tokens and channels of `data`."""
    def moments(images, masks):
        target = teacher(images, masks).float()
        return [target.mean(), target.square().mean()]
    mean, square = evaluate(moments, data, teacher.num_patches, args, process)
    teacher.scale.fill_((square - mean ** 2) ** -0.5)


def update(model, teacher, batches, optimizer, scaler, args, process):
    """One optimizer step over `accum` micro-batches (images, masks) -> this process's mean loss,
    left on the device; not finite where it is not, -inf where only the shared gradient is not."""
    total = torch.zeros((), device=process.device)
    for micro, (images, masks) in enumerate(batches):
        # Processes average their gradients once, during the backward pass of the last micro-batch.
        last = process.world == 1 or micro == args.accum - 1
        with contextlib.nullcontext() if last else model.no_sync():
            with process.autocast():
                target = teacher(images, masks)  # first: before the activations fill the memory
                loss = reconstruction_loss(model(images, masks), target, masks, args.loss)
            scaler.scale(loss / args.accum).backward()
        total += loss.detach() / args.accum
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
    if not scaler.is_enabled():  # in float16 it leaves out such a step, and scales less
        total = torch.where(norm.isfinite(), total, total - math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return total


def train(model, teacher, train_set, val_set, args, process, saved=None):
    """The whole run: updates, validation, log and checkpoints -> the last validation loss.

    args: from parse_args. saved: the dict in the last.pt of the run to go on with, or None. Raises
    Stopped, the run saved, where process.stop is set; ValueError where the loss is not finite.
    """
    per_epoch = math.ceil(len(train_set) / args.global_batch)
    total, warmup = args.epochs * per_epoch, args.warmup_epochs * per_epoch
    parallel, optimizer, scaler, flops = prepare(model, teacher, val_set, args, process, saved)
    new = dict(step=0, best=math.inf, losses=[])  # lowest validation loss; those not yet logged
    step, best, losses = ((saved or new)[name] for name in new)
    if process.rank == 0:
        start_folder(args, saved)

    def checkpoint(name="last.pt"):  # the state after `step` updates, and before their validation
        losses[:] = mean_losses(losses, step, process)
        if process.rank == 0:
            write_file(f"{args.out}/{name}", dict(
                model=model.state_dict(), optimizer=optimizer.state_dict(), step=step, best=best,
                scaler=scaler.state_dict(), scale=teacher.scale.item(), losses=losses,
                log=os.path.getsize(f"{args.out}/log.jsonl"), args=vars(args),
                sizes=[len(train_set), len(val_set)]))

    bar = tqdm(total=total, initial=step, unit="step", disable=process.rank > 0)
    try:
        # last.pt is from before its epoch's validation: a run stopped there begins with that alone.
        for epoch in range(max(0, math.ceil(step / per_epoch) - 1), args.epochs):
            first = (step - epoch * per_epoch) * args.accum
            order = training_order(len(train_set), epoch, args, process)[first:]
            clock = time.perf_counter()
            with contextlib.closing(load(train_set, order, (epoch,), teacher.num_patches, args,
                                         process, first)) as batches:
                while step < (epoch + 1) * per_epoch:
                    lr = learning_rate(step, total, warmup, args.lr, args.min_lr)
                    optimizer.param_groups[0]["lr"] = lr
                    losses.append(update(parallel, teacher, itertools.islice(batches, args.accum),
                                         optimizer, scaler, args, process))
                    step += 1
                    bar.update()
                    if step % args.log_every == 0:
                        losses[:] = mean_losses(losses, step, process)
                        log_rates(bar, train_set.spent, time.perf_counter() - clock, flops, args,
                                  process, step=step, lr=lr, loss=sum(losses) / len(losses))
                        losses.clear()
                        clock = time.perf_counter()
                    if step % per_epoch == 0 or step % args.save_every == 0:
                        checkpoint()
                    go_on(process)
            val_loss = validate(model, teacher, val_set, step, args, process)
            if val_loss < best:
                best = val_loss
                checkpoint("best.pt")
    except Stopped:
        checkpoint()
        raise Stopped(f"after step {step} of {total}, and saved")
    finally:
        bar.close()
    return val_loss


def prepare(model, teacher, val_set, args, process, saved):
    """Everything for the next step, as `saved` has it or new -> the model, averaging over processes
    and compiled, AdamW, float16's scaler, and the operations that one training image takes."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], args.lr, betas=(0.9, 0.95),
        weight_decay=args.weight_decay, fused=process.device.type != "mps")
    scaler = torch.amp.GradScaler(process.device.type, enabled=process.dtype == torch.float16)
    if saved:
        with explaining(f"{args.out}/last.pt does not fit"):
            model.load_state_dict(saved.pop("model"))
            optimizer.load_state_dict(saved.pop("optimizer"))
            scaler.load_state_dict(saved["scaler"])
            teacher.scale.fill_(saved["scale"])
    elif args.loss == "mse":
        measure_scale(teacher, val_set, args, process)
    if process.rank == 0:
        print(f"scale    s = {teacher.scale:.4f}, of the targets")
    embed = teacher.patch_embed
    image = torch.zeros(1, embed.proj.in_channels, *embed.img_size, device=process.device)
    masks = image.new_ones(1, 1 + args.complement + args.full, teacher.num_patches)
    with FlopCounterMode(display=False) as counter, process.autocast():
        reconstruction_loss(model(image, masks), teacher(image, masks), masks).backward()
    model.zero_grad()
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    if args.compile:
        torch._dynamo.config.cache_size_limit = 64  # so many kinds of blocks, shapes, modes
        torch._dynamo.config.optimize_ddp = False  # a block is less than what it would cut
        teacher.compile(dynamic=False)
        model.compile(dynamic=False)
    if process.world > 1:
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model, optimizer, scaler, counter.get_total_flops()


def log_rates(bar, spent, seconds, flops, args, process, **entry):
    """Logs and shows what was fast and what was slow in the last seconds: see Images.spent."""
    images = spent["images"] * process.world
    entry.update(speed=images / seconds, loader=images / max(spent["work"], 1e-9),  # images/s
                 wait=spent["wait"] / seconds, tflops=images / seconds * flops / 1e12)
    spent.clear()
    write_log(args, process, **entry)
    bar.set_postfix(entry)


def mean_losses(losses, step, process):
    """Means over all ranks of the losses of the updates up to `step`, read from the device.

    Raises ValueError, on every rank, where one of them is not finite.
    """
    ranks = all_ranks(process, [float(loss) for loss in losses])
    for number, of_ranks in enumerate(zip(*ranks), step - len(losses) + 1):
        own = [rank for rank, loss in enumerate(of_ranks) if loss != loss or loss == math.inf]
        rank = min(own, default="all")  # -inf: it came from another, with the shared gradient
        require(all(map(math.isfinite, of_ranks)), f"step {number}, rank {rank}: the loss or its "
                "gradient is not finite; try a lower --lr; the last checkpoint is from before")
    return [sum(of_ranks) / process.world for of_ranks in zip(*ranks)]


@torch.no_grad()
def validate(model, teacher, data, step, args, process):
    """The loss over `data`, logged; encoder/, and a picture of what the embeddings have become."""
    def loss(images, masks):
        prediction, target = model(images, masks), teacher(images, masks)
        return [reconstruction_loss(prediction, target, masks, args.loss)]
    model.eval()
    value = evaluate(loss, data, teacher.num_patches, args, process).item()
    require(math.isfinite(value), f"validation loss {value} after step {step}: try a lower --lr")
    entry = dict(step=step, val_loss=value)
    if process.rank == 0:
        images = torch.stack([data[0, i][0] for i in range(min(8, len(data)))])
        shown, grid = images.to(process.device), teacher.patch_embed.grid_size
        with process.autocast():
            before = teacher.tokens(shown, shown.new_ones(len(shown), 1, teacher.num_patches))[:, 0]
        encoder = copy.deepcopy(model.encoder).cpu()  # float32, not compiled
        after = encoder.fc_norm(encoder.forward_features(images))
        low, high = images.amin((1, 2, 3), True), images.amax((1, 2, 3), True)
        save_picture(f"{args.out}/patches.png", {
            "image": (images - low) / (high - low + 1e-6),
            "before:\nteacher": principal_colours(before, grid),
            "after:\nencoder": principal_colours(after, grid)})
        if timm.is_model(args.model):  # the demo's is none of timm's
            entry["plain_timm"] = export(f"{args.out}/encoder", encoder, args, images, after)
            tqdm.write(f"step {step}: validation loss {value:.4f}; in plain timm the tokens of "
                       f"{args.out}/encoder differ by {entry['plain_timm']:.1e}")
    write_log(args, process, **entry)
    model.train()
    return value


def write_log(args, process, **entry):
    """Appends a line to log.jsonl, and to wandb where that was asked for, with the picture."""
    if process.rank == 0:
        with explaining(f"cannot write to {args.out}"), open(f"{args.out}/log.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")
        if args.wandb:
            import wandb
            if "val_loss" in entry:
                entry["patches"] = wandb.Image(f"{args.out}/patches.png")
            wandb.log(entry, step=entry["step"])


def export(folder, encoder, args, images, tokens):
    """The aligned ViT in timm's hub layout: timm.create_model(f"local-dir:{folder}").

    Plain timm has no soft cap: returns, and writes into config.json, how far its tokens of `images`
    are from the encoder's, `tokens`, as a share of their norm. load_aligned(folder) is exact.
    """
    size = list(encoder.patch_embed.img_size)
    plain = timm.create_model(args.model, num_classes=0, global_pool="", img_size=size).eval()
    load_weights(plain, {"model": encoder.state_dict()}, args.model)
    difference = ((plain(images) - tokens).norm() / tokens.norm()).item()
    plain.pretrained_cfg.update(input_size=(3, *size), num_classes=0)
    about = dict(model=args.model, softcap=args.softcap, img_size=size, difference=difference)
    with explaining(f"cannot write to {folder}"):
        os.makedirs(folder, exist_ok=True)
        draft, build = Path(folder, "config.json.tmp"), {"img_size": size, "global_pool": ""}
        save_config_for_hf(plain, draft, {"maskembed": about}, build)
        config = json.loads(draft.read_text())
    config["model_args"].pop("num_classes", None)  # said at the top; transformers wants it once
    write_file(f"{folder}/model.safetensors", safetensors.torch.save(plain.state_dict()))
    write_file(f"{folder}/config.json", json.dumps(config, indent=1).encode())
    return difference


# ---- pictures ------------------------------------------------------------------------------------
def principal_colours(tokens, grid):
    """Tokens (n, T, D) -> (n, 3, *grid) in 0..1: the patches' first 3 principal components."""
    x = tokens[:, -math.prod(grid):].float().cpu().flatten(0, 1)
    x = x - x.mean(dim=0)
    x = x @ torch.linalg.eigh(x.T @ x)[1][:, -3:].flip(1)  # (n N, 3), the largest first
    low, high = x.quantile(0.02, dim=0), x.quantile(0.98, dim=0)
    x = ((x - low) / (high - low + 1e-6)).clamp(0, 1)
    return x.view(len(tokens), *grid, 3).permute(0, 3, 1, 2)


def save_picture(path, columns, legend=(), size=128):
    """A labelled grid: columns {title: (n, 3, h, w) in 0..1}; legend [(text, [r, g, b])]."""
    panels = [F.interpolate(c.float().cpu(), (size, size)) for c in columns.values()]
    grid = make_grid(torch.stack(panels, 1).flatten(0, 1), len(panels), padding=6, pad_value=1)
    image = to_pil_image(F.pad(grid, (0, 0, 40, 36 * bool(legend)), value=1.0))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=16)
    for i, title in enumerate(columns):
        draw.multiline_text((6 + i * (size + 6), 2), title, fill="black", font=font, spacing=1)
    for i, (text, colour) in enumerate(legend):
        left, top = 8 + i * (image.width - 8) // len(legend), image.height - 30
        draw.rectangle((left, top, left + 20, top + 20), fill=tuple(colour), outline="black")
        draw.text((left + 26, top), text, fill="black", font=font)
    with explaining(f"cannot write {path}"):
        image.save(path)


# ---- demo ----------------------------------------------------------------------------------------
COLOURS = torch.tensor([[40, 40, 40], [230, 25, 75], [60, 180, 75], [255, 225, 25], [0, 130, 200],
                        [245, 130, 48], [145, 30, 180], [70, 240, 240], [250, 190, 212]])


def probe(train, labels, test, test_labels, classes=len(LETTERS) + 1):
    """Linear classifier on frozen features (n, N, D), labels (n, N), by logistic regression.

    Returns what it reads from the test features, (m, N), and the means over the classes, without
    background (0), of intersection over union and of recall.
    """
    mean, std = train.mean((0, 1)), train.std((0, 1)) + 1e-6
    x, y = ((train - mean) / std).flatten(0, 1), labels.flatten()
    linear = nn.Linear(len(mean), classes)
    nn.init.zeros_(linear.weight)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(linear(x), y) + 1e-4 * linear.weight.square().sum()
        value.backward()
        return value
    optimizer.step(loss)
    read = linear((test - mean) / std).argmax(dim=2)
    reads, truths = (F.one_hot(y.flatten(), classes)[:, 1:] for y in (read, test_labels))
    hits, either = (reads & truths).sum(0), (reads | truths).sum(0)  # (classes - 1,)
    iou, recall = hits / either.clamp(min=1), hits / truths.sum(0).clamp(min=1)
    return read, iou.mean().item(), recall.mean().item()


def pretrain(vit, images, present, steps):
    """Teaches a ViT which letters are in an image, present (n, 8), and nothing about where."""
    optimizer = torch.optim.AdamW(vit.parameters(), 2e-3)
    for step in tqdm(range(steps), "pretrain"):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, steps // 10, 2e-3, 0.0)
        batch = torch.randint(len(images), (128,))
        loss = F.binary_cross_entropy_with_logits(vit(images[batch]), present[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    vit.eval()


def demo(args):
    """The paper's story in minutes, on the CPU: pretrain, align, probe, look; files in args.out."""
    process = Process(0, 1, torch.device("cpu"), torch.float32, contextlib.nullcontext, [])
    steps, many = args.demo, min(2000, 8 * args.demo)  # images to fit the probes, images to test
    torch.manual_seed(args.seed)
    taken = Path(args.out, "args.json").exists()  # a demo's are in its subfolders
    require(not taken, f"{args.out} holds a run: choose another --out")
    with explaining(f"cannot write to --out {args.out}"):
        os.makedirs(args.out, exist_ok=True)
        write_file(f"{args.out}/log.jsonl", b"")
    letters = Letters(32 * steps + 2 * many, seed=args.seed)
    images = torch.empty(len(letters), 3, 48, 48)  # filled in place: a list would double it
    inks = torch.empty(len(letters), 48, 48, dtype=torch.uint8)
    for i, (image, ink) in enumerate(tqdm(letters, "draw letters")):
        images[i], inks[i] = pil_to_tensor(image) / 127.5 - 1, pil_to_tensor(ink)[0]
    labels = patch_labels(inks, 8)
    present = F.one_hot(labels, 9).amax(1)[:, 1:].float()  # (n, 8): which letters are in the image
    train_images, fit, test = images.split([32 * steps, many, many])
    fit_labels, test_labels = labels[32 * steps:].split(many)

    vit = VisionTransformer(48, 8, num_classes=8, embed_dim=64, depth=4, num_heads=4)
    pretrain(vit, train_images, present, steps)
    with torch.no_grad():
        said, truth = vit(test) > 0, present[-many:] > 0
    f1 = 2 * (said & truth).sum().item() / (said.sum() + truth.sum()).item()
    write_log(args, process, step=steps, name="pretraining", f1=f1)
    print(f"pretrained: F1 {f1:.3f} for which letters are in a new image")

    def probed(name, features):
        with torch.no_grad():
            known, new = (torch.cat([features(x) for x in part.split(500)]) for part in (fit, test))
        read, iou, recall = probe(known, fit_labels, new, test_labels)
        write_log(args, process, step=steps, name=name, iou=iou, recall=recall)
        print(f"{name:24} mean IoU {iou:.3f}, mean recall {recall:.3f}")
        return iou, read, new
    best = max((probed(f"teacher, block {i + 1}", lambda x: vit.forward_intermediates(
        x, indices=[i], intermediates_only=True, output_fmt="NLC")[0]) for i in range(4)),
        key=lambda result: result[0])

    def aligned(name, flags=""):
        words = ("--model demo --skip-blocks 0 --epochs 2 --batch-size 64 --lr 2e-3 --workers 0 "
                 f"--no-compile --seed {args.seed} {flags}")
        settings = parse_args([*words.split(), "--out", f"{args.out}/{name}"])
        torch.manual_seed(args.seed)  # both begin with the same decoder
        teacher, model = Teacher(vit, settings.skip_blocks), MaskEmbed(vit)
        sets = [Images(x.__getitem__, range(len(x)), nn.Identity())
                for x in (train_images, fit[:256])]
        train(model, teacher, *sets, settings, process)
        return probed(name, lambda x: model.encoder.forward_features(x)[:, 1:])
    after = aligned("aligned")
    control = aligned("control", "--mask-kind bernoulli --keep 1 --no-complement --no-full")
    print(f"gain in mean IoU: {after[0] - best[0]:+.3f} over the teacher's best block, "
          f"{after[0] - control[0]:+.3f} over the control (full masks only)")
    demo_picture(f"{args.out}/patches.png", test, test_labels, best, after)


def demo_picture(path, test, labels, before, after):
    """Six images with many letters: true labels, what the probes read, principal components."""
    show = (labels > 0).sum(1).argsort(descending=True, stable=True)[:6]

    def letters(classes):
        return COLOURS[classes[show]].view(6, 6, 6, 3).permute(0, 3, 1, 2) / 255

    def components(tokens):
        return principal_colours(tokens[show], (6, 6))
    columns = {
        "image": (test[show] + 1) / 2, "true\nletters": letters(labels),
        "read from\nteacher": letters(before[1]), "read from\naligned": letters(after[1]),
        "components,\nteacher": components(before[2]),
        "components,\naligned": components(after[2])}
    save_picture(path, columns, list(zip(["none", *LETTERS], COLOURS.tolist())))
    print(f"picture: {path}")


# ---- command line --------------------------------------------------------------------------------
def parse_args(argv=None):
    """The settings of a run from command-line words -> argparse.Namespace. ValueError if bad."""
    parser = argparse.ArgumentParser(description="MaskEmbed, arXiv 2410.11087",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = functools.partial(require, False)  # raises InputError(message), no usage lines
    yes_no, dtypes = argparse.BooleanOptionalAction, ["auto", "bfloat16", "float16", "float32"]
    cores = len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0))
    g = parser.add_argument_group("model")
    g.add_argument("--model", default="vit_base_patch16_clip_quickgelu_224.openai", help="timm ViT")
    g.add_argument("--pretrained", action=yes_no, default=True, help="weights from the model hub")
    g.add_argument("--checkpoint", metavar="FILE", help="weights from this file instead")
    g.add_argument("--img-size", type=int, help="side in pixels, if not the model's")
    g.add_argument("--skip-blocks", type=int, default=1, help="last teacher blocks to drop")
    g.add_argument("--prefix-only", action=yes_no, default=False, help="predict prefix tokens only")
    g.add_argument("--softcap", type=float, default=30.0, help="bound of attention logits, 0 = off")
    g.add_argument("--head", default="linear", choices=["linear", "mlp"], help="encoder to decoder")
    g.add_argument("--decoder-layers", type=int, default=2, help="blocks of the decoder")
    g.add_argument("--decoder-width", type=int, help="channels, if not the encoder's")
    g.add_argument("--freeze-encoder", action=yes_no, default=False, help="but for norm and head")
    g = parser.add_argument_group("masks and loss")
    g.add_argument("--mask-kind", default="uniform", choices=MASKS, help="how patches are drawn")
    g.add_argument("--keep", type=float, default=0.5, help="visible share, if not uniform")
    g.add_argument("--complement", action=yes_no, default=True, help="use the mask 1 - m as well")
    g.add_argument("--full", action=yes_no, default=True, help="use the full mask as well")
    g.add_argument("--loss", default="mse", choices=LOSSES, help="masked: mse on hidden patches")
    g = parser.add_argument_group("data")
    g.add_argument("--data", metavar="PATH", help="folder, tar, torch/..., hfds/...; or built-in")
    g.add_argument("--num-images", type=int, default=2000, help="number of built-in images")
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    g.add_argument("--workers", type=int, default=max(1, min(32, share)),
                   help="that read images, per process; its share of the cores, at most 32")
    g.add_argument("--auto-augment", metavar="POLICY", help="timm's, e.g. rand-m9-mstd0.5-inc1")
    g.add_argument("--mixup", type=float, default=0.0, help="alpha, 0 = off")
    g.add_argument("--cutmix", type=float, default=0.0, help="alpha, 0 = off")
    g = parser.add_argument_group("training")
    g.add_argument("--epochs", type=int, default=5, help="passes over the images")
    g.add_argument("--batch-size", type=int, default=32, help="images per micro-batch and process")
    g.add_argument("--accum", type=int, default=1, help="micro-batches to an update")
    g.add_argument("--lr", type=float, default=3e-4, help="highest learning rate")
    g.add_argument("--min-lr", type=float, help="lowest learning rate; lr / 10 if left out")
    g.add_argument("--warmup-epochs", type=int, default=0, help="epochs of rising lr")
    g.add_argument("--weight-decay", type=float, default=0.01, help="AdamW's, on all parameters")
    g.add_argument("--clip-grad", type=float, default=1.0, help="greatest gradient norm, 0 = off")
    g.add_argument("--seed", type=int, default=0, help="of all that is random")
    g = parser.add_argument_group("run")
    g.add_argument("--dtype", default="auto", choices=dtypes, help="of matrix products")
    g.add_argument("--grad-checkpointing", action=yes_no, default=False, help="slower, less memory")
    cuda = torch.cuda.is_available()
    g.add_argument("--compile", action=yes_no, default=cuda, help="torch.compile, block by block")
    g.add_argument("--out", metavar="DIR", help="output folder; output/MODEL if left out")
    g.add_argument("--resume", action=yes_no, default=False, help="go on from DIR/last.pt, if any")
    g.add_argument("--save-every", type=int, default=1000, help="updates; also after each epoch")
    g.add_argument("--log-every", type=int, default=20, help="updates from log to log")
    g.add_argument("--wandb", metavar="PROJECT", help="log to Weights & Biases as well")
    g.add_argument("--demo", type=int, nargs="?", const=500, metavar="STEPS", help="the story, "
                   "in 3 minutes: 500 steps; --demo 80 is a quick look")
    args = parser.parse_args(argv)
    alone = {**vars(parser.parse_args([])), **{n: vars(args)[n] for n in ("demo", "out", "seed")}}
    require(not args.demo or vars(args) == alone, "--demo goes with --out and --seed alone")
    return checked(args)


def checked(args):
    """The same settings, dependent defaults filled in; ValueError where one is out of range."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    args.global_batch = args.batch_size * args.accum * world  # images to an update
    if args.data and os.path.exists(args.data):
        args.data = os.path.abspath(args.data)
    args.min_lr = args.lr / 10 if args.min_lr is None else args.min_lr
    args.out = args.out or os.path.join("output", "demo" if args.demo else args.model)
    from_0 = ("skip_blocks", "workers", "warmup_epochs", "seed")  # other whole numbers: from 1
    for name, value in vars(args).items():
        low = int(type(value) is int and name not in from_0)
        high = 1 if name == "keep" else 2 ** 31
        require(type(value) not in (int, float) or low <= value <= high,
                f"--{name.replace('_', '-')} {value} is not in {low} to {high:g}")
    require(args.min_lr <= args.lr, f"--min-lr {args.min_lr} is above --lr {args.lr}")
    require(args.warmup_epochs < args.epochs, "--warmup-epochs must be less than --epochs")
    require(not args.demo or world == 1, "--demo runs in one process")
    require(args.mask_kind != "uniform" or args.keep == 0.5, "--keep does nothing to uniform masks")
    return args


def read_run(args):
    """The dict in args.out/last.pt, or None where there is none. ValueError where there is a run
    but no --resume, or where a setting differs that matters."""
    path = f"{args.out}/last.pt"
    held = any(Path(args.out, name).exists() for name in ("args.json", "log.jsonl", "last.pt"))
    require(args.resume or not held, f"{args.out} holds a run: pass --resume or another --out")
    if not os.path.exists(path):
        return None
    saved = read_file(path)
    with explaining(f"{path} is not from a run"):
        before, _, _ = (saved[name] for name in ("args", "step", "sizes"))  # all must be there
        longer = " epochs" * (args.epochs > before["epochs"])  # stretches the schedule
    free = ("batch_size accum workers compile grad_checkpointing out resume save_every log_every "
            "wandb" + longer).split()
    changed = [f"{name} was {before.get(name)}, not {value}" for name, value in vars(args).items()
               if name not in free and before.get(name) != value]
    require(not changed, f"{'; '.join(changed)}: --resume with the settings of {path}, or start "
            "anew with another --out")
    return saved


def run(args):
    """One run, from its settings to the last checkpoint."""
    process = start_process(args.dtype)
    args.dtype = str(process.dtype).split(".")[1]  # what "auto" means here: --resume compares it
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    saved = read_run(args)
    if args.wandb and process.rank == 0:
        with explaining("--wandb: pip install wandb, and log in"):
            import wandb
            wandb.init(project=args.wandb, config=vars(args))
    vit = load_vit(args.model, args.pretrained, args.img_size, args.checkpoint)
    teacher = Teacher(vit, args.skip_blocks, args.prefix_only).to(process.device)
    model = MaskEmbed(vit, args.softcap, args.head, args.decoder_layers, args.decoder_width,
                      args.prefix_only).to(process.device)
    if args.freeze_encoder:  # all but its new norm and head
        for name, parameter in model.encoder.named_parameters():
            parameter.requires_grad_(name.startswith(("norm.", "fc_norm.", "head.")))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    for turn in range(3):  # a data set is downloaded once, then once on every node, then found
        if turn == min(process.rank, 1 + (local_rank > 0)):
            train_set, val_set = open_images(args, vit)
        all_ranks(process, None)
    sizes = [len(train_set), len(val_set)]
    step, before = (saved["step"], saved["sizes"]) if saved else (0, sizes)
    same = all(other == (step, sizes) for other in all_ranks(process, (step, sizes)))
    require(same, f"not the same --data, or last.pt in {args.out}, for all processes: share them")
    require(before == sizes, f"--data holds {sizes} images, and held {before} for {args.out}")
    if process.rank == 0:
        describe(args, process, vit, model, sizes, step)
        if saved and saved["args"]["epochs"] < args.epochs:
            print("schedule stretched from {} to {} epochs: the learning rate jumps to where a "
                  "longer run would have it".format(saved["args"]["epochs"], args.epochs))
    with stopping(process.stop):
        try:
            val_loss = train(model, teacher, train_set, val_set, args, process, saved)
            text = f"done     validation loss {val_loss:.4f}; 1.0 is the mean predictor's, for mse"
        except Stopped as where:
            text = f"stopped  {where}: to go on, repeat the command with --resume"
    if process.rank == 0:
        print(text)
    if torch.distributed.is_initialized():
        time.sleep(0.1)  # torch 2.4 joins gloo's threads with Python's lock, which they may need
        torch.distributed.destroy_process_group()


def describe(args, process, vit, model, sizes, step):
    """Prints what is going to happen, and with which weights: a bare timm name may hide others."""
    tag = vit.pretrained_cfg.get("tag") or "untagged"
    if "." not in args.model and re.search("_ft_|^v2|augreg2|metaclip|dfn", tag):
        tag += " (a bare name: weights that are fine-tuned, or newer than the paper's)"
    weights = args.checkpoint or (tag if args.pretrained else "random weights")
    embed, window = vit.patch_embed, args.global_batch
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"model    {args.model}, {weights}; {trained:,} trained parameters\n"
          f"input    {embed.img_size} pixels, patches of {embed.patch_size}: N = "
          f"{embed.num_patches}, P = {vit.num_prefix_tokens} prefix tokens, "
          f"K = {1 + args.complement + args.full} masks\n"
          f"data     {args.data or 'built-in images, for trying things out'}: {sizes[0]} to train "
          f"on, {sizes[1]} held out\n"
          f"training {args.epochs} epochs of {math.ceil(sizes[0] / window)} steps, from step "
          f"{step}, lr {args.lr:g} to {args.min_lr:g}, global batch {window} = {process.world} "
          f"processes x {args.batch_size} images x {args.accum}\n"
          f"device   {process.device}, {process.dtype}"
          f"{', compiled in the first step' * args.compile}\n"
          f"output   {args.out}")


def main(argv=None):
    """The command line: python maskembed.py --help. Bad input: one line on stderr, exit code 2."""
    try:
        args = parse_args(argv)
        demo(args) if args.demo else run(args)
    except InputError as error:  # one from a worker begins with the worker's traceback
        print(f"maskembed: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # where nothing is trained: in the demo, or before the first step
        sys.exit("maskembed: interrupted")


if __name__ == "__main__":
    main()
