#!/usr/bin/env python3
"""MaskEmbed, the training procedure of locality alignment, in one file.
Covert et al. 2024, "Locality Alignment Improves Vision-Language Models", arXiv 2410.11087.

A ViT trained on whole images knows what each region holds, but its patch embeddings do not say it.
MaskEmbed trains them to say it, without labels. A frozen copy f sees only some patches of an image,
so its output tells what these contribute. A trainable copy g sees the whole image, and its patch
embeddings are masked afterwards. A small decoder h predicts f's output from those that are left:

    min over g, h of   E_x,m  || h(m * g(x)) - s f(m * x) ||^2      (mean over tokens and channels)

To succeed for every mask, each patch embedding must carry what its own patch contributes.

    paper  in this file       shape
    x      images             (B, C, H, W)   B images of C channels, H x W pixels
    m      masks              (B, K, N)      K masks for each image, N patches; 1 = visible
    s f    Teacher            (B, K, T, D)   T = P + N tokens of D channels: prefix, then patches
    g      MaskEmbed.encoder  (B, T, D)      P prefix tokens: the class token, registers
    h      MaskEmbed.decoder  (B, K, T, D)
    s      Teacher.scale      one number     1 / standard deviation of f(m * x), validation images

    python maskembed.py --demo                                              # a laptop, 3 minutes
    python maskembed.py --data DIR --batch-size 32 --accum 32               # one GPU
    torchrun --nproc-per-node=8 maskembed.py --data DIR --batch-size 128    # eight GPUs
"""
import argparse, copy, glob, json, math, os, random, sys, tempfile
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from timm.models.vision_transformer import Attention, Block, PatchEmbed, VisionTransformer
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm


# ---- masks ---------------------------------------------------------------------------------------
def sample_masks(batch_size, num_patches, num_masks=3, keep=None, generator=None):
    """Draws masks m, 1 = visible: float (B, K, N) on the CPU. K = num_masks is 1, 2 or 3.
    In this order: a random mask, its complement, the full mask. `keep` is the probability that a
    patch is visible (Bernoulli masks). If it is None, each image draws its own (uniform masks)."""
    if keep is None:  # then every number of visible patches, from 0 to N, is equally likely
        keep = torch.rand(batch_size, 1, generator=generator)  # (B, 1)
    drawn = (torch.rand(batch_size, num_patches, generator=generator) < keep).float()  # (B, N)
    # A mask with its complement (an antithetic pair) lowers the variance of the gradient. The full
    # mask keeps the output for whole images in the objective.
    return torch.stack([drawn, 1 - drawn, torch.ones_like(drawn)][:num_masks], dim=1)


def mask_pixels(images, masks, patch_size):
    """m * x: images (B, C, H, W), normalised, and masks (B, K, N) -> (B, K, C, H, W).
    Hidden patches become 0, the mean colour. Raises RuntimeError if N does not fit the images."""
    height, width = images.shape[2:]
    # Each mask value fills its patch. Pixels beyond the last whole patch belong to none: hide them.
    grid = masks.to(images).unflatten(2, (height // patch_size, width // patch_size))
    visible = grid.repeat_interleave(patch_size, dim=2).repeat_interleave(patch_size, dim=3)
    visible = F.pad(visible, (0, width - visible.shape[3], 0, height - visible.shape[2]))
    return images[:, None] * visible[:, :, None]  # (B, 1, C, H, W) * (B, K, 1, H, W)


# ---- teacher, encoder, decoder -------------------------------------------------------------------
def without_head(vit):
    """Copies a ViT without pooling and head -> it returns all tokens, (B, T, D).
    Raises ValueError for parts that mask_pixels, SoftcapAttention or Decoder do not reproduce."""
    plain = (type(vit) is VisionTransformer and isinstance(vit.norm, nn.LayerNorm)
             and type(vit.patch_embed) is PatchEmbed and len(set(vit.patch_embed.patch_size)) == 1
             and type(vit.blocks[0]) is Block and type(vit.blocks[0].attn) is Attention
             and isinstance(vit.blocks[0].attn.norm, nn.Identity)
             and getattr(vit.blocks[0].attn, "gate", None) is None)
    if not plain:
        raise ValueError(f"{type(vit).__name__}: no plain timm ViT (square patches, final `norm`)")
    vit = copy.deepcopy(vit)
    vit.reset_classifier(0, global_pool="")
    return vit


class Teacher(nn.Module):
    """s f(m * x), the frozen ViT: images (B, C, H, W), masks (B, K, N) -> (B, K, T, D).
    A copy of `vit` less its last `skip_blocks` blocks, with its final norm, in eval mode. scale: 1,
    until set to s: teacher.scale /= teacher(images, masks).std(). ValueError for other ViTs."""
    def __init__(self, vit, skip_blocks=1):
        super().__init__()
        self.vit = without_head(vit).requires_grad_(False).eval()
        if not 0 <= skip_blocks < len(vit.blocks):
            raise ValueError(f"cannot skip {skip_blocks} of {len(vit.blocks)} blocks")
        # Likely the last block prepares the pooled token rather than the patches: leave it out.
        self.vit.blocks = self.vit.blocks[:len(vit.blocks) - skip_blocks]
        self.register_buffer("scale", torch.ones((), device=next(vit.parameters()).device))

    def train(self, mode=True):
        return super().train(False)  # stays in eval mode when a parent module calls train()

    @torch.no_grad()
    def forward(self, images, masks):
        views = mask_pixels(images, masks, self.vit.patch_embed.patch_size[0])  # (B, K, C, H, W)
        # One mask after the other: the ViT's activations take less memory than for all at once.
        tokens = [self.vit(view) for view in views.unbind(dim=1)]  # K times (B, T, D)
        return self.scale * torch.stack(tokens, dim=1)  # (B, K, T, D)


class SoftcapAttention(nn.Module):
    """timm's Attention, (B, T, D) -> (B, T, D), but its logits a become c tanh(a / c), c = softcap.
    It keeps attn's layers under their names, so the keys of a state dict stay timm's."""
    def __init__(self, attn, softcap):
        super().__init__()
        self.num_heads, self.scale, self.softcap = attn.num_heads, attn.scale, softcap
        self.qkv, self.q_norm, self.k_norm = attn.qkv, attn.q_norm, attn.k_norm
        self.attn_drop, self.proj, self.proj_drop = attn.attn_drop, attn.proj, attn.proj_drop

    def forward(self, x, attn_mask=None, is_causal=False):  # timm's blocks pass all three
        assert attn_mask is None and not is_causal, "SoftcapAttention takes no attention mask"
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, T, 3, heads, D / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, D / heads)
        q = self.q_norm(q) * (self.scale / self.softcap)  # q @ k is a / c: cheaper than scaling a
        logits = self.softcap * torch.tanh(q @ self.k_norm(k).transpose(-2, -1))  # (B, heads, T, T)
        x = self.attn_drop(logits.softmax(dim=-1)) @ v  # (B, heads, T, D / heads)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))  # (B, T, D)


class Decoder(nn.Module):
    """h(m * tokens), prefix tokens hidden too: (B, T, D) and masks (B, K, N) -> (B, K, T, D)."""
    def __init__(self, vit, num_layers):
        super().__init__()
        dim, attn, mlp = vit.embed_dim, vit.blocks[0].attn, vit.blocks[0].mlp
        self.num_prefix = vit.num_prefix_tokens
        num_tokens = self.num_prefix + vit.patch_embed.num_patches
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, num_tokens, dim))
        self.blocks = nn.Sequential(*[  # vit's heads, biases, qk norm and MLP class
            Block(dim, attn.num_heads, mlp_ratio=4, qkv_bias=attn.qkv.bias is not None,
                  qk_norm=not isinstance(attn.q_norm, nn.Identity), norm_layer=nn.LayerNorm,
                  act_layer=type(mlp.act), mlp_layer=type(mlp), init_values=1e-6)  # LayerScale
            for _ in range(num_layers)])
        self.norm = nn.LayerNorm(dim)  # all new norms have PyTorch's eps, 1e-5, whatever vit's
        self.head = nn.Linear(dim, dim)

    def forward(self, tokens, masks):
        # Prefix tokens are always hidden: they have attended to the whole image, and would give
        # hidden patches away. Positions are added after masking, so hidden tokens have one too.
        visible = F.pad(masks.to(tokens), (self.num_prefix, 0))  # (B, K, T), 0 for prefix
        x = tokens[:, None] * visible[..., None]  # (B, 1, T, D) * (B, K, T, 1)
        x = self.blocks((x + self.pos_embed).flatten(0, 1))  # (B * K, T, D)
        return self.head(self.norm(x)).unflatten(0, masks.shape[:2])  # (B, K, T, D)


class MaskEmbed(nn.Module):
    """h(m * g(x)), the trained part: images (B, C, H, W), masks (B, K, N) -> (B, K, T, D).
    encoder is `vit` with soft-capped attention (0: no cap), a new final norm and a head. To use it,
    take encoder.forward_features(images), the tokens before the head. ValueError for other ViTs."""
    def __init__(self, vit, softcap=30.0, decoder_layers=2):
        super().__init__()
        self.encoder = without_head(vit).requires_grad_(True).train()
        self.decoder = Decoder(vit, decoder_layers)
        if softcap:  # bounds the logits ("stable attention"); the teacher must keep its outputs
            for block in self.encoder.blocks:
                block.attn = SoftcapAttention(block.attn, softcap)
        self.encoder.norm = nn.LayerNorm(vit.embed_dim)
        self.encoder.head = nn.Linear(vit.embed_dim, vit.embed_dim)
        # As the authors do, the head starts at zero: the decoder sees its positions alone. So the
        # first step trains decoder and head, and the rest of the encoder learns from the second on.
        nn.init.zeros_(self.encoder.head.weight)
        nn.init.zeros_(self.encoder.head.bias)
        self.to(next(vit.parameters()))  # its device and dtype

    def forward(self, images, masks):
        return self.decoder(self.encoder(images), masks)  # the encoder runs once for all K masks


# ---- loss ----------------------------------------------------------------------------------------
def reconstruction_loss(prediction, target, kind="mse"):
    """Prediction, target (B, K, T, D) -> scalar, the mean over tokens. kind: "mse" or "cosine".
    Raises ValueError for another kind, and for shapes that differ (they might broadcast)."""
    if prediction.shape != target.shape:
        raise ValueError(f"shapes differ: {tuple(prediction.shape)}, {tuple(target.shape)}")
    if kind == "mse":
        return F.mse_loss(prediction, target)
    if kind == "cosine":
        return 1 - F.cosine_similarity(prediction, target, dim=-1).mean()
    raise ValueError(f"unknown loss {kind!r}: choose mse or cosine")


def maskembed_loss(model, teacher, images, masks, kind="mse"):
    """The equation at the top, for a batch: images (B, C, H, W), masks (B, K, N) -> scalar."""
    target = teacher(images, masks)  # first, before the prediction's activations fill the memory
    return reconstruction_loss(model(images, masks), target, kind)


# ---- data ----------------------------------------------------------------------------------------
LETTERS = " ACEHKSTX"  # what a cell of a picture can hold; the first is nothing


def draw_letters(count, size=48, seed=0):
    """Draws pictures of 1 to 4 letters in a 3 x 3 grid, size x size pixels, to try things out.
    -> list of RGB images; int array (count, 3, 3), each cell's letter as an index into LETTERS."""
    rng = np.random.default_rng(seed)
    font = ImageFont.load_default(0.376 * size)  # a letter fills its cell
    pictures, contents = [], np.zeros((count, 3, 3), dtype=np.int64)
    for cells in tqdm(contents, "draw"):
        noise = Image.fromarray(rng.integers(64, 192, (6, 6, 3), dtype=np.uint8))
        picture = noise.resize((size, size), Image.BICUBIC)
        for place in rng.choice(9, rng.integers(1, 5), replace=False):
            row, column = divmod(place, 3)
            cells[row, column] = rng.integers(1, len(LETTERS))
            centre = (column + 0.5) * size / 3, (row + 0.5) * size / 3
            letter, colour = LETTERS[cells[row, column]], tuple(rng.choice([0, 255], 3).tolist())
            ImageDraw.Draw(picture).text(centre, letter, colour, font, anchor="mm")
        pictures.append(picture)
    return pictures, contents


class Folder:
    """The images in a folder and the folders in it, sorted by path: [i] -> RGB image.
    A file that cannot be read is named, and the next one taken. ValueError after 20 tries."""
    def __init__(self, folder):
        # glob follows links, and leaves out hidden files: macOS puts ._NAME.jpg beside NAME.jpg.
        paths = glob.glob(f"{glob.escape(str(folder))}/**/*", recursive=True)
        paths = sorted(map(os.fsencode, filter(torchvision.datasets.folder.is_image_file, paths)))
        if not paths:
            raise ValueError(f"there are no images in {folder}")
        self.paths = np.array(paths)  # takes less memory than a list, in every worker

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        for place in range(index, index + 20):
            path = os.fsdecode(self.paths[place % len(self)])
            try:
                return Image.open(path).convert("RGB")
            except Exception as error:  # Pillow raises many kinds
                tqdm.write(f"skipped {path}: {error}", file=sys.stderr)
        raise ValueError(f"in 20 tries no image could be read, the last file was {path}")


def open_images(folder=None, size=224, seed=0):
    """A folder, or letters if None -> (images to train on, images to validate on). ValueError if it
    is empty. If it lacks train/ or val/, every 100th image is held out (every 10th below 1000)."""
    if folder and Path(folder, "train").is_dir() and Path(folder, "val").is_dir():
        return Folder(Path(folder, "train")), Folder(Path(folder, "val"))
    images = Folder(folder) if folder else draw_letters(1000, size, seed)[0]
    places = np.arange(len(images))
    held_out = places % (100 if len(images) >= 1000 else 10) == 0
    return Subset(images, places[~held_out]), Subset(images, places[held_out])


class MaskedImages(Dataset):
    """[epoch, i] -> image (C, H, W) and masks (K, N), both random but decided by (seed, epoch, i).
    So processes, workers and restarts change nothing. `transform` makes images[i] a tensor, and may
    use torch's and Python's random numbers, not NumPy's: reading an item seeds these two."""
    def __init__(self, images, transform, num_patches, num_masks=3, keep=None, seed=0):
        self.images, self.transform, self.seed = images, transform, seed
        self.num_patches, self.num_masks, self.keep = num_patches, num_masks, keep

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        epoch, index = key
        seed = int(np.random.SeedSequence([self.seed, epoch, index]).generate_state(1)[0])
        torch.manual_seed(seed)
        random.seed(seed)
        masks = sample_masks(1, self.num_patches, self.num_masks, self.keep)[0]
        return self.transform(self.images[index]), masks


def training_order(num_images, epochs, batch_size, accum=1, rank=0, world=1, seed=0, start=0):
    """The batch_sampler for one pass over MaskedImages: this process's lists of (epoch, i), for all
    epochs from update `start` on. How accum * world * batch_size is split changes no update.
    Each epoch has its own order. Images at its end that are too few for an update are left out."""
    per_update = accum * world * batch_size
    per_epoch = num_images // per_update
    for epoch in range(start // per_epoch, epochs):
        order = np.random.default_rng([seed, epoch]).permutation(num_images)
        for step in range(max(0, start - epoch * per_epoch), per_epoch):
            places = order[step * per_update:(step + 1) * per_update]
            for micro_batch in places.reshape(accum, world, batch_size)[:, rank]:  # (batch_size,)
                yield [(epoch, int(i)) for i in micro_batch]


# ---- training ------------------------------------------------------------------------------------
def learning_rate(step, total, warmup, peak):
    """Linear from peak / 10 to peak in `warmup` updates, then a cosine to peak / 10 at `total`."""
    if step < warmup:
        share = step / warmup
    else:
        share = (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
    return peak / 10 + share * (peak - peak / 10)


@torch.no_grad()
def evaluate(model, teacher, loader, kind="mse", bf16=False):
    """All processes' images -> {"val_loss": mean loss, "target_std": of all target entries}."""
    device = teacher.scale.device
    sums = torch.zeros(4, dtype=torch.float64)  # over images of 1, loss, target, target ** 2
    model.eval()
    for images, masks in tqdm(loader, "val", leave=False, disable=int(os.environ.get("RANK", 0))):
        images, masks = images.to(device), masks.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            target = teacher(images, masks).float()
            loss = reconstruction_loss(model(images, masks), target, kind)
        sums += len(images) * torch.tensor([1, loss, target.mean(), target.square().mean()])
    model.train()
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    _, loss, mean, square = (sums / sums[0]).tolist()
    return {"val_loss": loss, "target_std": max(0, square - mean ** 2) ** 0.5}


def update(model, teacher, optimizer, batches, lr, kind="mse", accum=1, bf16=False):
    """One step of an optimizer with one parameter group, on the next `accum` (images, masks) of an
    iterator -> mean loss, norm of the gradient before clipping. `model` may be wrapped in DDP."""
    device = teacher.scale.device
    optimizer.zero_grad()
    mean_loss = torch.zeros((), device=device)  # over micro-batches
    for micro in range(accum):
        images, masks = [x.to(device, non_blocking=x.is_pinned()) for x in next(batches)]
        model.require_backward_grad_sync = micro == accum - 1  # DDP averages gradients once
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = maskembed_loss(model, teacher, images, masks, kind) / accum
        loss.backward()
        mean_loss += loss.detach()
    gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    return mean_loss, gradient_norm


def train(model, teacher, train_set, val_set, args, saved=None):
    """The whole run, from the start or from `saved`, a last.pt. args: the flags and what `prepare`
    adds. Raises FloatingPointError before a loss or gradient that is not finite is saved."""
    bf16 = args.dtype == "bfloat16"
    val_keys = [(0, i) for i in range(args.rank, len(val_set), args.world)]  # epoch 0: fixed masks
    val_loader = DataLoader(val_set, args.batch_size, sampler=val_keys, num_workers=args.workers)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    start = 0
    if saved:
        start = saved["step"]
        model.load_state_dict(saved.pop("model"))  # pop: it is large
        optimizer.load_state_dict(saved.pop("optimizer"))
        teacher.scale.fill_(saved["scale"])
    elif args.loss == "mse":
        # Then a loss of 1 is no better than predicting the overall mean of the targets.
        teacher.scale /= evaluate(model, teacher, val_loader, args.loss, bf16)["target_std"]
    if args.compile:
        torch._dynamo.config.cache_size_limit = 64  # a version per kind of block, mode, batch size
        for block in [*teacher.vit.blocks, *model.encoder.blocks, *model.decoder.blocks]:
            block.compile(dynamic=False)
    log(args, step=start, scale=teacher.scale.item(),
        **evaluate(model, teacher, val_loader, args.loss, bf16))
    parallel = nn.parallel.DistributedDataParallel(model) if args.world > 1 else model
    order = training_order(args.num_images, args.epochs, args.batch_size, args.accum, args.rank,
                           args.world, args.seed, start)
    batches = iter(DataLoader(train_set, batch_sampler=order, num_workers=args.workers,
                              pin_memory=teacher.scale.is_cuda))
    per_epoch = args.num_images // args.images_per_update
    total = args.epochs * per_epoch
    for step in tqdm(range(start + 1, total + 1), "train", total, initial=start, disable=args.rank):
        lr = learning_rate(step - 1, total, args.warmup_epochs * per_epoch, args.lr)
        mean_loss, gradient_norm = update(parallel, teacher, optimizer, batches, lr, args.loss,
                                          args.accum, bf16)
        ends_epoch = step % per_epoch == 0
        if step % args.log_every == 0 or step % args.save_every == 0 or ends_epoch:
            if args.world > 1:
                torch.distributed.all_reduce(mean_loss)  # adds up over processes
            loss = mean_loss.item() / args.world  # waits for the device, as other updates do not
            if not math.isfinite(loss) or not gradient_norm.isfinite():
                raise FloatingPointError(f"step {step}: loss {loss}, gradient norm {gradient_norm}")
            log(args, step=step, loss=loss, lr=lr)
        if args.rank == 0 and (step % args.save_every == 0 or ends_epoch):
            state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step,
                         scale=teacher.scale.item(), settings=vars(args))
            torch.save(state, f"{args.out}/last.pt.tmp")
            os.replace(f"{args.out}/last.pt.tmp", f"{args.out}/last.pt")  # never half written
        if ends_epoch:
            log(args, step=step, **evaluate(model, teacher, val_loader, args.loss, bf16))


# ---- results -------------------------------------------------------------------------------------
def log(args, **entry):
    """Adds a line to log.jsonl and prints it. After --resume, steps since last.pt come again."""
    if args.rank == 0:
        with open(f"{args.out}/log.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")
        tqdm.write("  ".join(f"{name} {value:.6g}" for name, value in entry.items()))


def export(encoder, folder):
    """Writes a ViT of timm.create_model, less its head. It loads, without the soft cap, maybe with
    another last epsilon, by timm.create_model("local-dir:FOLDER", pretrained=True)."""
    vit = copy.deepcopy(encoder)
    vit.head = nn.Identity()
    model_args = {"img_size": list(vit.patch_embed.img_size), "global_pool": ""}
    timm.models.save_for_hf(vit, folder, safe_serialization=True, model_args=model_args)


def load_aligned(path):
    """The aligned ViT in a last.pt of this program, soft cap included, in eval mode. It maps images
    (B, C, H, W) to all tokens of the last layer, normed: (B, T, D). OSError without such a file."""
    saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    settings = saved["settings"]
    vit = timm.create_model(settings["model"], img_size=settings["img_size"])
    model = MaskEmbed(vit, settings["softcap"])
    model.load_state_dict(saved["model"])
    model.encoder.head = nn.Identity()
    return model.encoder.eval()


# ---- demo ----------------------------------------------------------------------------------------
@torch.no_grad()
def probe(vit, block, images, labels):
    """Predicts the labels (n, N) of patches from their embeddings after a block, by least squares.
    Fits weights on the first half -> labels read in the second half, mean IoU of the letters."""
    tokens = vit.get_intermediate_layers(images, [block], norm=True)[0]  # of patches: (n, N, D)
    tokens = (tokens - tokens.mean((0, 1))) / tokens.std((0, 1))
    fit_x, test_x = F.pad(tokens, (0, 1), value=1.0).chunk(2)  # (n / 2, N, D + 1), 1 for the bias
    fit_y, test_y = F.one_hot(labels, len(LETTERS)).chunk(2)  # (n / 2, N, classes)
    weights = torch.linalg.lstsq(fit_x.flatten(0, 1), fit_y.flatten(0, 1).float()).solution
    read = (test_x @ weights).argmax(dim=2)  # (n / 2, N)
    read_y = F.one_hot(read, len(LETTERS))
    iou = (read_y & test_y).sum((0, 1)) / (read_y | test_y).sum((0, 1)).clamp(min=1)
    return read, iou[1:].mean().item()


def demo(args):
    """A small ViT, the teacher, learns which letters are in a picture, but is never told where. Two
    copies learn to predict it: from whole images (control), and from masked ones too (aligned)."""
    heeded = {name: vars(args)[name] for name in "seed num_masks keep loss softcap out".split()}
    print(demo.__doc__, f"Settings: {heeded}. Other flags are ignored.", sep="\n    ")
    torch.manual_seed(args.seed)
    pictures, contents = draw_letters(16 * args.demo + 2000, seed=args.seed)
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1  # (n, 3, 48, 48)
    labels = torch.from_numpy(contents.repeat(2, 1).repeat(2, 2)).flatten(1)  # (n, 36): 4 to a cell
    images, test_images, test_labels = images[:-2000], images[-2000:], labels[-2000:]
    present = F.one_hot(labels, len(LETTERS)).amax(1)[:, 1:].float()  # (n, 8): which, but not where
    vit = VisionTransformer(48, 8, num_classes=8, embed_dim=64, depth=3, num_heads=2)
    optimizer = torch.optim.AdamW(vit.parameters(), fused=True)
    for step in tqdm(range(args.demo), "pretrain"):
        optimizer.param_groups[0]["lr"] = learning_rate(step, args.demo, args.demo // 10, peak=2e-3)
        batch = torch.randint(len(images), (64,))
        F.binary_cross_entropy_with_logits(vit(images[batch]), present[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    vit.eval()
    encoders = {f"teacher, block {block + 1}": (vit, block) for block in range(3)}
    for name, num_masks, keep in (("control", 1, 1.0), ("aligned", args.num_masks, args.keep)):
        teacher, model = Teacher(vit, skip_blocks=0), MaskEmbed(vit, args.softcap)  # only 3 blocks
        teacher.scale /= teacher(test_images[:500], sample_masks(500, 36, num_masks, keep)).std()
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=True)
        for step in tqdm(range(args.demo), name):
            lr = learning_rate(step, args.demo, warmup=0, peak=2e-3)
            batch = images[torch.randint(len(images), (16,))], sample_masks(16, 36, num_masks, keep)
            update(model, teacher, optimizer, iter([batch]), lr, args.loss)
        encoders[name] = model.encoder.eval(), 2
    sheet, font = Image.new("RGB", (1648, 1056), "white"), ImageFont.load_default(28)
    draw, ious = ImageDraw.Draw(sheet), {}
    for column in range(8):  # pictures of 6 x 6 patches of 28 pixels, from the half that is read
        sheet.paste(pictures[column - 1000].resize((168, 168)), (240 + 176 * column, 0))
    draw.text((8, 8), "blue: right\norange: wrong\ngrey: missed\nblack: none", "black", font)
    print("A linear probe reads from each patch's embedding which letter it is part of. Mean IoU:")
    for row, (name, (encoder, block)) in enumerate(encoders.items(), start=1):
        reads, ious[name] = probe(encoder, block, test_images, test_labels)
        print(f"{ious[name]:8.3f}  {name}")
        draw.text((8, 176 * row + 48), f"{name}\nIoU {ious[name]:.3f}", "black", font)
        for column, patch in np.ndindex(8, 36):
            read, true = reads[column, patch], test_labels[1000 + column, patch]
            x, y = 240 + 176 * column + 28 * (patch % 6), 176 * row + 28 * (patch // 6)
            colours = ("black", "royalblue") if read == true else ("grey", "darkorange")
            draw.rectangle((x, y, x + 27, y + 27), colours[int(read > 0)])
            draw.text((x + 14, y + 14), LETTERS[read], "white", font, anchor="mm")
    sheet.save(f"{args.out}/demo.png")
    print(f"{ious['aligned'] - max([*ious.values()][:3]):+8.3f}  gain over the best teacher block")
    print(f"{ious['aligned'] - ious['control']:+8.3f}  gain over the control (full masks only)")
    print(f"{args.out}/demo.png: what was read in eight pictures. The IoU is of 1000.")
    return sheet


# ---- command line --------------------------------------------------------------------------------
def parse_args(argv=None):
    """Command-line words -> settings (argparse.Namespace). Exits with one line if one is wrong."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag, yes_no = parser.add_argument, argparse.BooleanOptionalAction
    flag("--model", default="vit_base_patch16_clip_quickgelu_224.openai", help="a timm ViT")
    flag("--pretrained", action=yes_no, default=True, help="weights from the hub, else random ones")
    flag("--checkpoint", metavar="FILE", help="weights from this file instead")
    flag("--img-size", type=int, help="side in pixels (None: the model's own)")
    flag("--softcap", type=float, default=30.0, help="cap on the encoder's logits (0: no cap)")
    flag("--skip-blocks", type=int, default=1, help="last blocks that the teacher leaves out")
    flag("--num-masks", type=int, default=3, choices=[1, 2, 3], help="random, complement, full")
    flag("--keep", type=float, help="probability of a visible patch (None: uniform masks)")
    flag("--loss", default="mse", choices=["mse", "cosine"], help="distance to the target")
    flag("--data", metavar="DIR", help="folder of images (None: built-in pictures of letters)")
    flag("--workers", type=int, default=min(8, os.cpu_count()), help="per process, to read images")
    flag("--epochs", type=int, default=5, help="passes over the images")
    flag("--warmup-epochs", type=int, default=0, help="epochs in which the learning rate rises")
    flag("--batch-size", type=int, default=32, help="images per process and micro-batch")
    flag("--accum", type=int, default=1, help="micro-batches per update (paper: 1024 images)")
    flag("--lr", type=float, default=3e-4, help="highest learning rate; the lowest is a tenth")
    flag("--seed", type=int, default=0, help="of random weights, order, masks, augmentation")
    flag("--dtype", default="auto", choices=["auto", "bfloat16", "float32"], help="of arithmetic")
    flag("--compile", action=yes_no, default=False, help="torch.compile, block by block")
    flag("--out", metavar="DIR", help="folder for the results (None: output/MODEL)")
    flag("--resume", action=yes_no, default=False, help="go on from last.pt in --out, if it exists")
    flag("--save-every", type=int, default=1000, help="updates between saves; also each epoch")
    flag("--log-every", type=int, default=20, help="updates between log entries")
    flag("--demo", type=int, nargs="?", const=500, metavar="STEPS", help="the idea, in 500 STEPS")
    args = parser.parse_args(argv)
    lowest = dict(img_size=32, epochs=1, batch_size=1, accum=1, save_every=1, log_every=1, demo=1,
                  workers=0, warmup_epochs=0, softcap=0, lr=0, keep=0, seed=0)
    for name, low in lowest.items():
        value, high = getattr(args, name), (1 if name == "keep" else 2**31)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} {value} is not in {low} to {high}")
    args.out = args.out or ("output/demo" if args.demo else f"output/{args.model}")
    return args


def create_vit(name, pretrained=True, img_size=None, checkpoint=None):
    """A timm ViT with weights from the hub, from a file, or random. ValueError if that fails.
    A file's position embeddings are resampled where it was trained on another image size."""
    try:
        vit = timm.create_model(name, pretrained and not checkpoint, img_size=img_size)
        if checkpoint:
            vit = without_head(vit)  # the head in the file may be another one, or missing
            keys = timm.models.load_checkpoint(
                vit, checkpoint, strict=False, weights_only=True,
                filter_fn=timm.models.vision_transformer.checkpoint_filter_fn)
            if keys.missing_keys or any(key.startswith("blocks.") for key in keys.unexpected_keys):
                raise RuntimeError(f"lacks {keys.missing_keys[:3]}, has {keys.unexpected_keys[:3]}")
    except Exception as error:  # timm, torch and safetensors raise many kinds
        raise ValueError(f"cannot load {checkpoint or name} (or --no-pretrained): {error}")
    return vit


def load_saved(args):
    """last.pt in args.out, or None. Raises ValueError if these settings cannot go on from it."""
    path = Path(args.out, "last.pt")
    if not path.exists():
        return None
    if not args.resume:
        raise ValueError(f"{path} exists: go on from it with --resume, or choose another --out")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    may_change = ("data", "workers", "batch_size", "accum", "compile", "out", "resume",
                  "save_every", "log_every", "rank", "world")
    for name, value in saved["settings"].items():
        if name not in may_change and value != getattr(args, name):
            raise ValueError(f"cannot resume {path}: its {name} was {value}")
    return saved


def prepare(args):
    """Settings -> what `train` needs, in part in args. ValueError, OSError if they do not fit."""
    args.rank, args.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, dtype = torch.device("cpu"), "float32"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            dtype = "bfloat16"
    elif torch.backends.mps.is_available() and args.world == 1:
        device = torch.device("mps")
    args.dtype = dtype if args.dtype == "auto" else args.dtype
    if args.world > 1:
        torch.distributed.init_process_group()  # gloo on the CPU, nccl on CUDA
    torch.manual_seed(args.seed)
    vit = create_vit(args.model, args.pretrained, args.img_size, args.checkpoint).to(device)
    teacher, model = Teacher(vit, args.skip_blocks), MaskEmbed(vit, args.softcap)
    embed, size = vit.patch_embed, vit.patch_embed.img_size
    train_images, val_images = open_images(args.data, max(size), args.seed)
    config = {**timm.data.resolve_model_data_config(vit), "input_size": (3, *size)}
    val_transform = timm.data.create_transform(**config)
    train_transform = timm.data.create_transform(
        **{**config, "interpolation": "random"}, is_training=True, train_crop_mode="rkrc",
        scale=(0.08, 1), ratio=(3 / 4, 4 / 3), hflip=0.5, color_jitter=None)
    mask_args = embed.num_patches, args.num_masks, args.keep, args.seed
    train_set = MaskedImages(train_images, train_transform, *mask_args)
    val_set = MaskedImages(val_images, val_transform, *mask_args)
    args.num_images = len(train_set)
    args.images_per_update = args.world * args.batch_size * args.accum
    if args.num_images < args.images_per_update:
        raise ValueError(f"lower --batch-size: {args.images_per_update} > {args.num_images} images")
    train_set[0, 0]  # an error in reading images should come now
    saved = load_saved(args)
    if args.rank == 0:
        weights = f"tag {vit.pretrained_cfg.get('tag')}" if args.pretrained else "random"
        print(f"model   {args.model}, weights: {args.checkpoint or weights}, "
              f"{embed.num_patches} patches of side {embed.patch_size[0]}\n"
              f"images  {args.data or 'built-in pictures of letters (--data DIR: your own)'}: "
              f"{len(train_set)} to train on, {len(val_set)} held out\n"
              f"update  {args.images_per_update} images = {args.world} processes x "
              f"{args.batch_size} x {args.accum} micro-batches, on {device} in {args.dtype}")
    return model, teacher, train_set, val_set, saved


def main(argv=None):
    """The command line. Settings, models, data that cannot be used: one line, exit code 2."""
    args = parse_args(argv)
    try:
        os.makedirs(args.out, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()  # an error in writing should come now
        if not args.demo:
            model, teacher, train_set, val_set, saved = prepare(args)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"maskembed.py: error: {' '.join(str(error).split())}\n")
        sys.exit(2)
    if args.demo:
        return demo(args)
    train(model, teacher, train_set, val_set, args, saved)
    if args.rank == 0:
        export(model.encoder, f"{args.out}/encoder")
        print(f"done: {args.out}/last.pt, {args.out}/log.jsonl, {args.out}/encoder/")
    if args.world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
