#!/usr/bin/env python3
"""MaskEmbed, the training procedure of locality alignment, in one file.
Covert et al. 2024, "Locality Alignment Improves Vision-Language Models", arXiv 2410.11087.

The patch embeddings (output tokens) of a pretrained ViT may say little about their own patches.
MaskEmbed trains them to say more, without labels. A frozen copy f of the ViT sees only some patches
of an image, so its output depends on those alone. A trainable copy g sees the whole image, and its
patch embeddings are masked afterwards. A small decoder h predicts f's output from what remains:

    min over g, h of   E_x,m  || h(m * g(x)) - s f(m * x) ||^2      (mean over tokens and channels)

This works for every mask only if each patch embedding tells what its own patch adds to f's output.

    paper  in this file       shape
    x      images             (B, C, H, W)   B images of C channels, H x W pixels
    m      masks              (B, K, N)      K masks for each image, N patches; 1 = visible
    s f    Teacher            (B, K, T, D)   T = P + N tokens of width D: prefix, then patches
    g      MaskEmbed.encoder  (B, T, D)      P prefix tokens: the class token, registers
    h      MaskEmbed.decoder  (B, K, T, D)
    s      Teacher.scale      scalar         1 / std of f(m * x) over the validation images

    python maskembed.py --demo                                              # 3 minutes on a laptop
    python maskembed.py --data DIR --batch-size 32 --accum 32               # one GPU
    torchrun --nproc-per-node=8 maskembed.py --data DIR --batch-size 128    # eight GPUs
"""
import argparse, copy, json, math, os, random, sys, tempfile

import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets.folder import is_image_file
from tqdm import tqdm


# ---- masks ---------------------------------------------------------------------------------------
def sample_masks(batch_size, num_patches, num_masks=3, keep=None, generator=None):
    """Draws masks m for a batch of images: float (B, K, N) on the CPU, 1 = visible. K is num_masks:
    a random mask alone (1), with its complement (2), and with the full mask as well (3). `keep` is
    the probability that a patch is visible. If None, it is drawn from U(0, 1) for each image."""
    if keep is None:  # then all numbers of visible patches, from 0 to N, are equally likely
        keep = torch.rand(batch_size, 1, generator=generator)  # (B, 1)
    drawn = (torch.rand(batch_size, num_patches, generator=generator) < keep).float()  # (B, N)
    # A mask with its complement (an antithetic pair) lowers the variance of the gradient. With the
    # full mask, the decoder also has to predict the teacher's output for the whole image.
    return torch.stack([drawn, 1 - drawn, torch.ones_like(drawn)][:num_masks], dim=1)


def mask_pixels(images, masks, patch_size):
    """m * x: images (B, C, H, W) and masks (B, K, N) -> masked images (B, K, C, H, W).
    Hidden pixels become 0; normalization maps the mean colour to 0. Raises RuntimeError if N is not
    the number of patches in an image."""
    height, width = images.shape[2:]
    # Repeat each value over its patch. Hide pixels at the right and bottom that fill no patch.
    grid = masks.to(images).unflatten(2, (height // patch_size, width // patch_size))
    visible = grid.repeat_interleave(patch_size, dim=2).repeat_interleave(patch_size, dim=3)
    visible = F.pad(visible, (0, width - visible.shape[3], 0, height - visible.shape[2]))
    return images[:, None] * visible[:, :, None]  # (B, 1, C, H, W) * (B, K, 1, H, W)


# ---- teacher, encoder, decoder -------------------------------------------------------------------
def without_head(vit):
    """Returns a copy of a timm ViT without pooling and head: images (B, C, H, W) -> all tokens
    (B, T, D). Raises ValueError if vit is not a plain ViT, or lacks a final LayerNorm."""
    if (type(vit) is not VisionTransformer or type(vit.patch_embed) is not timm.layers.PatchEmbed
            or type(vit.blocks[0]) is not Block or not isinstance(vit.norm, nn.LayerNorm)):
        raise ValueError(f"{type(vit).__name__} is not a plain ViT whose last norm is a LayerNorm")
    vit = copy.deepcopy(vit)
    vit.reset_classifier(0, global_pool="")  # also removes SigLIP's attention pooling
    return vit


class Teacher(nn.Module):
    """s f(m * x), the frozen ViT: images (B, C, H, W), masks (B, K, N) -> (B, K, T, D).
    It is a copy of `vit` in eval mode, without its last `skip_blocks` blocks, but with the final
    norm. Its scale s is 1 until you set it: teacher.scale /= teacher(images, masks).std()"""
    def __init__(self, vit, skip_blocks=1):
        super().__init__()
        self.vit = without_head(vit).requires_grad_(False)
        if not 0 <= skip_blocks < len(vit.blocks):
            raise ValueError(f"cannot skip {skip_blocks} of {len(vit.blocks)} blocks")
        # The authors leave out the last block. We guess that it mainly serves the pooled output.
        self.vit.blocks = self.vit.blocks[:len(vit.blocks) - skip_blocks]
        self.register_buffer("scale", torch.ones((), device=next(vit.parameters()).device))

    @torch.no_grad()
    def forward(self, images, masks):
        self.vit.eval()  # even if a parent module is in training mode
        views = mask_pixels(images, masks, self.vit.patch_embed.patch_size[0])  # (B, K, C, H, W)
        # Each mask makes another input, so the ViT runs K times; one by one, to save memory.
        tokens = [self.vit(view) for view in views.unbind(dim=1)]  # K times (B, T, D)
        return self.scale * torch.stack(tokens, dim=1)  # (B, K, T, D)


class SoftcapAttention(nn.Module):
    """timm's Attention, (B, T, D) -> (B, T, D), with logits a replaced by c tanh(a / c), where c is
    `softcap`. It reuses attn's layers under the same names, so state-dict keys match timm's."""
    def __init__(self, attn, softcap):
        super().__init__()
        self.num_heads, self.scale, self.softcap = attn.num_heads, attn.scale, softcap
        self.qkv, self.q_norm, self.k_norm = attn.qkv, attn.q_norm, attn.k_norm
        self.attn_drop, self.proj, self.proj_drop = attn.attn_drop, attn.proj, attn.proj_drop
        if self.state_dict().keys() != attn.state_dict().keys():
            raise ValueError(f"{type(attn).__name__} has other layers, which are not supported")

    def forward(self, x, attn_mask=None, is_causal=False):  # the arguments of timm's Attention
        assert attn_mask is None and not is_causal, "SoftcapAttention takes no attention mask"
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, T, 3, heads, D / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, D / heads)
        q = self.q_norm(q) * (self.scale / self.softcap)  # q is smaller than a
        logits = self.softcap * torch.tanh(q @ self.k_norm(k).transpose(-2, -1))  # (B, heads, T, T)
        x = self.attn_drop(logits.softmax(dim=-1)) @ v  # (B, heads, T, D / heads)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))  # (B, T, D)


class Decoder(nn.Module):
    """h(m * tokens): tokens (B, T, D), masks (B, K, N) -> (B, K, T, D). It hides the prefix."""
    def __init__(self, vit, num_layers):
        super().__init__()
        dim, attn, mlp = vit.embed_dim, vit.blocks[0].attn, vit.blocks[0].mlp
        self.num_prefix = vit.num_prefix_tokens
        num_tokens = self.num_prefix + vit.patch_embed.num_patches
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, num_tokens, dim))
        self.blocks = nn.Sequential(*[  # number of heads, qkv bias, qk norm, MLP class as in vit
            Block(dim, attn.num_heads, mlp_ratio=4, qkv_bias=attn.qkv.bias is not None,
                  qk_norm=not isinstance(attn.q_norm, nn.Identity), norm_layer=nn.LayerNorm,
                  act_layer=type(mlp.act), mlp_layer=type(mlp), init_values=1e-6)  # near identity
            for _ in range(num_layers)])
        self.norm = nn.LayerNorm(dim)  # eps 1e-5, as in the authors' code
        self.head = nn.Linear(dim, dim)

    def forward(self, tokens, masks):
        # Prefix tokens are hidden by every mask. They summarize the image, and the decoder could
        # answer from them alone. Positions are added after masking, so hidden tokens keep theirs.
        visible = F.pad(masks.to(tokens), (self.num_prefix, 0))  # (B, K, T), 0 for prefix
        x = tokens[:, None] * visible[..., None]  # (B, 1, T, D) * (B, K, T, 1)
        x = self.blocks((x + self.pos_embed).flatten(0, 1))  # (B * K, T, D)
        return self.head(self.norm(x)).unflatten(0, masks.shape[:2])  # (B, K, T, D)


class MaskEmbed(nn.Module):
    """h(m * g(x)), the trained part: images (B, C, H, W), masks (B, K, N) -> (B, K, T, D).
    The encoder is a copy of `vit` with soft-capped attention (softcap 0: no cap), a new final norm
    and a head. After training, use encoder.forward_features(images), the tokens before the head."""
    def __init__(self, vit, softcap=30.0, decoder_layers=2):
        super().__init__()
        self.encoder = without_head(vit).requires_grad_(True).train()
        self.decoder = Decoder(vit, decoder_layers)
        if softcap:  # bounds the logits; the teacher keeps plain attention
            for block in self.encoder.blocks:
                block.attn = SoftcapAttention(block.attn, softcap)
        self.encoder.norm = nn.LayerNorm(vit.embed_dim)
        self.encoder.head = nn.Linear(vit.embed_dim, vit.embed_dim)
        # As in the authors' code, the head starts at zero, so the decoder sees only positions. Zero
        # weights pass no gradient back, so the encoder's blocks get none in the first step.
        nn.init.zeros_(self.encoder.head.weight)
        nn.init.zeros_(self.encoder.head.bias)
        self.to(next(vit.parameters()))  # the device and dtype of vit

    def forward(self, images, masks):
        return self.decoder(self.encoder(images), masks)  # the encoder runs once for K masks


# ---- loss ----------------------------------------------------------------------------------------
def maskembed_loss(model, teacher, images, masks):
    """The objective, over all T tokens: images (B, C, H, W), masks (B, K, N) -> scalar."""
    target = teacher(images, masks)  # before the model fills the memory with activations
    prediction = model(images, masks)
    assert prediction.shape == target.shape, "the shapes of prediction and target differ"
    return F.mse_loss(prediction, target)


# ---- data ----------------------------------------------------------------------------------------
LETTERS = " ACEHKSTX"  # what a cell of a picture can show; index 0 means no letter


def draw_letters(count, size=48, seed=0):
    """Draws pictures of 1 to 4 letters in 3 x 3 cells on noise. Returns a list of RGB images and an
    int array (count, 3, 3) with the letter in each cell, as an index into LETTERS."""
    rng = np.random.default_rng(seed)
    font = ImageFont.load_default(0.376 * size)  # capitals are nearly as high as a cell
    pictures = []
    cells = np.zeros((count, 3, 3), dtype=np.int64)
    for n in tqdm(range(count), "draw", disable=RANK > 0):
        noise = Image.fromarray(rng.integers(64, 192, (6, 6, 3), dtype=np.uint8))
        picture = noise.resize((size, size), Image.BICUBIC)
        for place in rng.choice(9, rng.integers(1, 5), replace=False):
            row, column = divmod(place, 3)
            letter = rng.integers(1, len(LETTERS))
            cells[n, row, column] = letter
            centre = (column + 0.5) * size / 3, (row + 0.5) * size / 3
            colour = tuple(rng.choice([0, 255], 3).tolist())
            ImageDraw.Draw(picture).text(centre, LETTERS[letter], colour, font, anchor="mm")
        pictures.append(picture)
    return pictures, cells


class Folder(Dataset):
    """The images in a folder and its subfolders, sorted by path: [i] -> RGB image. A file that
    cannot be read is reported and replaced by any other. Raises ValueError after 20 in a row."""
    def __init__(self, folder):
        folder = str(folder).rstrip("/")
        paths = [f"{root}/{name}" for root, _, names in os.walk(folder, followlinks=True)
                 for name in names if is_image_file(name)]
        paths = [path for path in paths if "/." not in path[len(folder):]]  # no hidden ones
        if not paths:
            raise ValueError(f"there is no folder {folder!r} with images (JPEG, PNG, WebP, ...)")
        self.paths = np.array(sorted(map(os.fsencode, paths)))  # workers would copy a list

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        for _ in range(20):
            path = os.fsdecode(self.paths[i])
            try:
                image = Image.open(path)
                if image.mode.startswith(("I", "F")):  # their values would be clipped
                    raise ValueError("a greyscale image of 16 or 32 bits; convert it to 8")
                return image.convert("RGB")
            except Exception as error:  # Pillow raises many types
                tqdm.write(f"replaced {path}: {error}", file=sys.stderr)
            i = random.randrange(len(self))  # the next one may be broken, too
        raise ValueError(f"20 files could not be read; the last one was {path}")


class MaskedImages(Dataset):
    """Images with masks: [epoch, i] -> image (C, H, W), masks (K, N). Both depend only on the seed,
    epoch and i, not on the process or worker, if the transform draws its random numbers from
    `random` and torch. `images` is a sequence of PIL images. `training_order` makes the keys."""
    def __init__(self, images, transform, num_patches, num_masks=3, keep=None, seed=0):
        self.images, self.transform, self.seed = images, transform, seed
        self.num_patches, self.num_masks, self.keep = num_patches, num_masks, keep

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        epoch, i = key
        # This reseeds the global generators of `random` and torch, which transforms draw from.
        random.seed(f"{self.seed} {epoch} {i}")
        torch.default_generator.manual_seed(random.getrandbits(63))  # torch.manual_seed is slower
        masks = sample_masks(1, self.num_patches, self.num_masks, self.keep)[0]
        return self.transform(self.images[i]), masks


def open_data(vit, folder=None, num_masks=3, keep=None, seed=0):
    """Returns the MaskedImages to train and to validate `vit` on: RGB images from a folder, or
    pictures of letters if folder is None. If it lacks train/ or val/, every 100th image is
    held out (every 10th if there are fewer than 1000). Raises ValueError if there are no images."""
    size, num_patches = vit.patch_embed.img_size, vit.patch_embed.num_patches
    names = [name for name in ("val", "valid", "validation") if os.path.isdir(f"{folder}/{name}")]
    if folder and names and os.path.isdir(f"{folder}/train"):
        train_images, val_images = Folder(f"{folder}/train"), Folder(f"{folder}/{names[0]}")
    else:
        images = Folder(folder) if folder is not None else draw_letters(900, max(size), seed)[0]
        indices = np.arange(len(images))
        every = 100 if len(images) >= 1000 else 10
        train_images = Subset(images, indices[indices % every > 0])
        val_images = Subset(images, indices[indices % every == 0])
    config = timm.data.resolve_model_data_config(vit)  # mean, std, interpolation
    config["input_size"] = (3, *size)
    val_transform = timm.data.create_transform(**config)
    config["interpolation"] = "random"
    train_transform = timm.data.create_transform(  # the authors' augmentation
        **config, is_training=True, train_crop_mode="rkrc", scale=(0.08, 1), ratio=(3 / 4, 4 / 3),
        hflip=0.5, color_jitter=None)
    return (MaskedImages(train_images, train_transform, num_patches, num_masks, keep, seed),
            MaskedImages(val_images, val_transform, num_patches, num_masks, keep, seed))


def training_order(num_images, epochs, batch_size, accum=1, rank=0, world=1, seed=0, start=0):
    """Yields the micro-batches of a process for all epochs, from update `start` on: lists of keys
    (epoch, i). It is a batch_sampler for one pass over MaskedImages. An update has the same images
    however many processes and micro-batches share it. An epoch's left-over images are skipped."""
    size = accum * world * batch_size  # images per update
    per_epoch = num_images // size  # updates
    for step in range(start, epochs * per_epoch):
        epoch, update = divmod(step, per_epoch)
        if step == start or update == 0:  # a new epoch: shuffle again
            order = np.random.default_rng([seed, epoch]).permutation(num_images)
        images = order[update * size:(update + 1) * size].reshape(accum, world, batch_size)
        for micro_batch in images[:, rank].tolist():
            yield [(epoch, i) for i in micro_batch]


# ---- training ------------------------------------------------------------------------------------
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # the number of processes, from torchrun
RANK = int(os.environ.get("RANK", 0)) if WORLD > 1 else 0  # the index of this process


def init_distributed():
    """Joins torchrun's process group if there are several processes. Returns the device of this
    process. Raises ValueError if this machine has GPUs, but fewer GPUs than processes."""
    device = torch.device("mps" if torch.backends.mps.is_available() and WORLD == 1 else "cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"there are more processes than GPUs ({torch.cuda.device_count()})")
        torch.cuda.set_device(device)
    if WORLD > 1:  # gloo is for tensors on the CPU, such as the sums in `evaluate`
        nccl = device.type == "cuda" and torch.distributed.is_nccl_available()
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo")
    return device


def learning_rate(step, total, warmup, peak):
    """Returns the learning rate for update `step`, counted from 0. It rises linearly from peak / 10
    to peak in `warmup` updates. Then it is a cosine that is peak at 0 and peak / 10 at `total`."""
    # As in the authors' code, the cosine counts the warm-up, so the rate can drop when that ends.
    fraction = step / warmup if step < warmup else (1 + math.cos(math.pi * step / total)) / 2
    return peak / 10 + fraction * (peak - peak / 10)


@torch.no_grad()
def evaluate(model, teacher, loader, bf16=False):
    """Returns the mean loss and the std of all target entries, over the data of all processes."""
    device = teacher.scale.device
    sums = torch.zeros(4, dtype=torch.float64)  # over images: 1, loss, target, target ** 2
    model.eval()
    for images, masks in tqdm(loader, "validate", leave=False, disable=RANK > 0):
        images, masks = images.to(device), masks.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            target = teacher(images, masks).float()
            loss = maskembed_loss(model, lambda *_: target, images, masks)  # runs the teacher once
        sums += len(images) * torch.tensor([1, loss, target.mean(), target.square().mean()])
    model.train()
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    _, loss, mean, mean_square = (sums / sums[0]).tolist()
    return loss, math.sqrt(max(mean_square - mean ** 2, 0))


def train(model, teacher, train_set, val_set, args, saved=None):
    """Trains the model with `args` of parse_args, from the start or from `saved`, the contents of a
    last.pt. Needs the folder args.out. Raises FloatingPointError if a logged loss is not finite."""
    device = teacher.scale.device
    cuda = device.type == "cuda"
    bf16 = args.dtype == "bfloat16"
    per_epoch = len(train_set) // args.images_per_update  # updates
    total = args.epochs * per_epoch
    val_keys = [(0, i) for i in range(RANK, len(val_set), WORLD)]  # epoch 0: the same masks
    val_loader = DataLoader(val_set, args.batch_size, sampler=val_keys, num_workers=args.workers,
                            persistent_workers=args.workers > 0)  # they start once, before DDP
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    start = saved["step"] if saved else 0
    if saved:
        model.load_state_dict(saved.pop("model"))  # pop: it is large
        optimizer.load_state_dict(saved.pop("optimizer"))
        teacher.scale.fill_(saved["scale"])
    else:  # scale the targets to a std of 1: then predicting their mean has a loss of 1
        _, target_std = evaluate(model, teacher, val_loader, bf16)
        teacher.scale /= target_std
    if args.compile:
        torch._dynamo.config.cache_size_limit = 64  # versions: kind of block, mode, batch size
        torch._dynamo.config.optimize_ddp = False  # it is for a compiled model, not for blocks
        for block in [*teacher.vit.blocks, *model.encoder.blocks, *model.decoder.blocks]:
            block.compile(dynamic=False)
    val_loss, _ = evaluate(model, teacher, val_loader, bf16)
    log(args, step=start, val_loss=val_loss, scale=teacher.scale.item())
    order = training_order(len(train_set), args.epochs, args.batch_size, args.accum, RANK, WORLD,
                           args.seed, start)  # for all epochs
    batches = iter(DataLoader(train_set, batch_sampler=order, num_workers=args.workers,
                              pin_memory=cuda))
    # Both loaders have started their workers. DDP starts NCCL, and then forking is unsafe.
    parallel = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model

    for step in tqdm(range(start + 1, total + 1), initial=start, total=total, disable=RANK > 0):
        mean_loss = torch.zeros((), device=device)
        for micro in range(args.accum):
            images, masks = [x.to(device, non_blocking=cuda) for x in next(batches)]
            if WORLD > 1:  # as in no_sync(): only the last backward() averages the gradients
                parallel.require_backward_grad_sync = micro == args.accum - 1
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = maskembed_loss(parallel, teacher, images, masks) / args.accum
            loss.backward()
            mean_loss += loss.detach() / WORLD
        gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        lr = learning_rate(step - 1, total, args.warmup_epochs * per_epoch, args.lr)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        ends_epoch = step % per_epoch == 0
        save_now = ends_epoch or step % args.save_every == 0
        if save_now or step % args.log_every == 0:  # the CPU waits for the GPU here
            if WORLD > 1:
                torch.distributed.all_reduce(mean_loss)  # adds up over processes
            if not (mean_loss.isfinite() and gradient_norm.isfinite()):
                raise FloatingPointError(f"step {step}: loss {mean_loss}, gradient {gradient_norm}")
            log(args, step=step, loss=mean_loss.item(), lr=lr)
        if save_now and RANK == 0:
            state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step,
                         scale=teacher.scale.item(), settings=vars(args))
            torch.save(state, f"{args.out}/last.pt.tmp")  # last.pt survives a kill here
            os.replace(f"{args.out}/last.pt.tmp", f"{args.out}/last.pt")
        if ends_epoch:
            val_loss, _ = evaluate(model, teacher, val_loader, bf16)
            log(args, step=step, val_loss=val_loss)


# ---- log and checkpoints -------------------------------------------------------------------------
def log(args, **entry):
    """Prints an entry and adds it to log.jsonl. After --resume, some steps may appear twice."""
    if RANK == 0:
        tqdm.write("  ".join(f"{name} {value:.7g}" for name, value in entry.items()))
        with open(f"{args.out}/log.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")
        if args.wandb:
            import wandb
            wandb.log(entry, step=entry["step"])


def load_last(args):
    """Returns the contents of last.pt in args.out, or None if it is absent. Raises ValueError if it
    cannot be read, if --resume is missing, or if a setting that is not free to change differs."""
    path = f"{args.out}/last.pt"
    if not os.path.lexists(path):
        return None
    if not args.resume:
        raise ValueError(f"{path} exists: continue with --resume, or choose another --out")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        old = dict(saved["settings"])
    except Exception as error:  # torch raises many types for a broken or foreign file
        raise ValueError(f"cannot read {path} (use another --out): {type(error).__name__}: {error}")
    free = "data workers batch_size accum compile out resume save_every log_every wandb".split()
    changed = {name: old.get(name) for name in old | vars(args)
               if name not in free and old.get(name) != vars(args).get(name)}
    if changed:
        raise ValueError(f"cannot resume {path}: it was trained with other settings: {changed}")
    return saved


def load_aligned(path):
    """Loads the aligned ViT, soft cap included, from a run's last.pt: images (B, C, H, W) -> all
    tokens of the last layer after the final norm (B, T, D). It is in eval mode."""
    saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    settings = saved["settings"]
    vit = timm.create_model(settings["model"], img_size=settings["img_size"])
    vit.pretrained_cfg["input_size"] = (3, *vit.patch_embed.img_size)  # for timm's transforms
    model = MaskEmbed(vit, settings["softcap"])
    model.load_state_dict(saved["model"])
    model.encoder.head = nn.Identity()
    return model.encoder.eval()


# ---- demo ----------------------------------------------------------------------------------------
@torch.no_grad()
def probe(vit, block, images, labels):
    """Predicts the labels (n, N) of patches from their embeddings after a block, by least squares.
    Fits its weights on the first half of the images, and returns the mean IoU over letters and the
    predictions (n / 2, N) for the second half."""
    tokens = vit.get_intermediate_layers(images, [block], norm=True)[0]  # of patches: (n, N, D)
    fit_x, test_x = F.pad(tokens, (0, 1), value=1.0).chunk(2)  # (n / 2, N, D + 1), 1 for the bias
    fit_y, test_y = F.one_hot(labels, len(LETTERS)).chunk(2)  # (n / 2, N, classes)
    weights = torch.linalg.lstsq(fit_x.flatten(0, 1), fit_y.flatten(0, 1).float()).solution
    predicted = (test_x @ weights).argmax(dim=2)  # (n / 2, N)
    predicted_y = F.one_hot(predicted, len(LETTERS))
    iou = (predicted_y & test_y).sum((0, 1)) / (predicted_y | test_y).sum((0, 1)).clamp(min=1)
    return iou[1:].mean().item(), predicted


def fit(name, model, loss_of, num_images, batch_size, steps):
    """Minimizes loss_of(indices of a random batch) over the parameters of a model."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=True)
    for step in tqdm(range(steps), name):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, steps // 10, peak=2e-3)
        loss_of(torch.randint(num_images, (batch_size,))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def demo(args):
    """A small ViT, the teacher, is trained with labels that say which letters are in a picture, but
    not where. Two copies are then trained to predict its output: the control from whole images, and
    the aligned encoder with MaskEmbed. A linear probe predicts which letter a patch shows from its
    embedding. The better it predicts, the better the embeddings describe their own patches."""
    print(f"    {demo.__doc__}")
    torch.manual_seed(args.seed)
    pictures, cells = draw_letters(16 * args.demo + 2000, seed=args.seed)
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1  # (n, 3, 48, 48)
    labels = torch.from_numpy(cells.repeat(2, axis=1).repeat(2, axis=2)).flatten(1)  # (n, 36)
    present = F.one_hot(labels, len(LETTERS)).amax(1)[:, 1:].float()  # (n, 8): which, but not where
    num_train = len(images) - 2000  # of the last 2000, half fit the probe and half test it

    vit = VisionTransformer(48, 8, num_classes=8, global_pool="avg", fc_norm=False, embed_dim=64,
                            depth=3, num_heads=2)

    def classification_loss(batch):
        return F.binary_cross_entropy_with_logits(vit(images[batch]), present[batch])

    fit("teacher", vit, classification_loss, num_train, 64, args.demo)
    probes = [probe(vit.eval(), block, images[-2000:], labels[-2000:]) for block in range(3)]
    results = {"teacher": max(probes, key=lambda result: result[0])}  # (IoU, predictions)
    for name, num_masks, keep in (("control", 1, 1.0), ("aligned", args.num_masks, args.keep)):
        teacher = Teacher(vit, skip_blocks=0)  # none, because there are only 3 blocks
        teacher.scale /= teacher(images[:500], sample_masks(500, 36, num_masks, keep)).std()
        model = MaskEmbed(vit, args.softcap)

        def alignment_loss(batch):
            masks = sample_masks(len(batch), 36, num_masks, keep)
            return maskembed_loss(model, teacher, images[batch], masks)

        fit(name, model, alignment_loss, num_train, 16, args.demo)
        results[name] = probe(model.encoder.eval(), 2, images[-2000:], labels[-2000:])

    print("Mean IoU over letters in 1000 new pictures (1 is perfect; teacher: its best block):")
    sheet = Image.new("RGB", (1750, 1000), "black")  # each picture has 240 x 240 pixels
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(36)
    draw.text((10, 40), "green: right\nred: wrong\nempty red:\n   missed", "white", font)
    for column in range(6):
        sheet.paste(pictures[column - 1000].resize((240, 240)), (250 + 250 * column, 0))
    for row, (name, (iou, predicted)) in enumerate(results.items(), start=1):
        print(f"{iou:8.3f}  {name}")
        draw.text((10, 250 * row + 80), f"{name}\nIoU {iou:.2f}", "white", font)
        for column, patch in np.ndindex(6, 36):
            letter, actual = predicted[column, patch], labels[column - 1000, patch]
            x, y = 250 + 250 * column + 40 * (patch % 6), 250 * row + 40 * (patch // 6)
            colour = "green" if letter == actual else "red"
            draw.rectangle((x, y, x + 38, y + 38), colour if letter or actual else "#333333")
            draw.text((x + 20, y + 20), LETTERS[letter], "white", font, anchor="mm")
    sheet.save(f"{args.out}/demo.png")
    print(f"{args.out}/demo.png shows the predictions for six pictures.")
    return sheet  # a notebook shows it


# ---- command line --------------------------------------------------------------------------------
def parse_args(argv=None):
    """Parses the command line. A wrong option gives a one-line message and exit code 2."""
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = "bfloat16" if bf16 else "float32"
    parser = argparse.ArgumentParser(  # an error is one line, without the usage
        usage=argparse.SUPPRESS, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, yes_no = parser.add_argument, argparse.BooleanOptionalAction
    add("--model", default="vit_base_patch16_clip_quickgelu_224.openai", help="timm's NAME.TAG")
    add("--pretrained", action=yes_no, default=True, help="load timm's weights, or use random ones")
    add("--checkpoint", metavar="FILE", help="load the weights from this file instead")
    add("--img-size", type=int, help="image side in pixels (None: the model's own)")
    add("--softcap", type=float, default=30.0, help="soft cap on attention logits (0: no cap)")
    add("--skip-blocks", type=int, default=1, help="number of last blocks that the teacher omits")
    add("--num-masks", type=int, default=3, choices=[1, 2, 3], help="random (+ complement, + full)")
    add("--keep", type=float, help="probability that a patch is visible (None: random)")
    add("--data", metavar="DIR", help="folder of images (None: built-in pictures of letters)")
    add("--workers", type=int, default=min(8, os.cpu_count()), help="loader workers per process")
    add("--epochs", type=int, default=5, help="passes over the images")
    add("--warmup-epochs", type=int, default=0, help="epochs in which the learning rate rises")
    add("--batch-size", type=int, default=32, help="images per process and micro-batch")
    add("--accum", type=int, default=1, help="micro-batches per process and update")
    add("--lr", type=float, default=3e-4, help="peak learning rate; the lowest is a tenth of it")
    add("--seed", type=int, default=0, help="seed for weights, order, masks and augmentation")
    add("--dtype", default=dtype, choices=["bfloat16", "float32"], help="precision of autocast")
    add("--compile", action=yes_no, default=False, help="use torch.compile on each block")
    add("--out", metavar="DIR", help="folder for the results (None: output/MODEL)")
    add("--resume", action=yes_no, default=False, help="continue from last.pt, if it exists")
    add("--save-every", type=int, default=1000, help="updates between saves; also after each epoch")
    add("--log-every", type=int, default=20, help="updates between log entries")
    add("--wandb", action=yes_no, default=False, help="also log to Weights & Biases")
    add("--demo", type=int, nargs="?", const=600, metavar="STEPS", help="run the demo (STEPS: 600)")
    args = parser.parse_args(argv)
    may_be_0 = "softcap skip_blocks keep workers warmup_epochs lr seed".split()
    for name, value in vars(args).items():
        lowest = 0 if name in may_be_0 else 1
        highest = {"keep": 1, "warmup_epochs": args.epochs - 1}.get(name, 2**31)
        if type(value) in (int, float) and not lowest <= value <= highest:  # nan, too
            parser.error(f"--{name.replace('_', '-')} {value} is outside [{lowest}, {highest}]")
    args.out = args.out or ("output/demo" if args.demo else f"output/{args.model}")
    args.images_per_update = WORLD * args.accum * args.batch_size  # stored like a flag
    return args


def create_vit(name, pretrained=True, img_size=None, checkpoint=None):
    """Returns a timm ViT with random weights, or weights from Hugging Face or a file. If a file is
    for another image or patch size, timm resamples its embeddings. Raises ValueError on failure."""
    try:
        vit = timm.create_model(name, pretrained and checkpoint is None, img_size=img_size)
        vit = without_head(vit)  # the head in a file may differ or be missing
        vit(torch.zeros(1, 3, *vit.patch_embed.img_size))  # fails now if img_size does not fit
        if checkpoint is not None:
            open(checkpoint).close()  # timm's own message for a missing file is empty
            keys = timm.models.load_checkpoint(vit, checkpoint, strict=False, weights_only=True,
                                               filter_fn=checkpoint_filter_fn)
            if keys.missing_keys or any(key.startswith("blocks.") for key in keys.unexpected_keys):
                raise ValueError(f"it lacks {keys.missing_keys[:3]} or has other blocks")
    except Exception as error:  # timm, torch and safetensors raise many types
        raise ValueError(f"cannot load {checkpoint or name}: {type(error).__name__}: {error}")
    return vit


def main(argv=None):
    """Runs the program. If it cannot start, it says why in one line, and exits with code 2."""
    args = parse_args(argv)
    try:
        os.makedirs(args.out, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()  # fails now if it is read-only
        if args.demo:
            return demo(args) if RANK == 0 else None
        device = init_distributed()
        torch.manual_seed(args.seed)
        vit = create_vit(args.model, args.pretrained, args.img_size, args.checkpoint)
        teacher = Teacher(vit, args.skip_blocks).to(device)
        model = MaskEmbed(vit, args.softcap).to(device)
        train_set, val_set = open_data(vit, args.data, args.num_masks, args.keep, args.seed)
        args.num_images = len(train_set)  # not a flag, but --resume compares it
        if args.num_images < args.images_per_update:
            raise ValueError(f"{args.num_images} images do not fill an update: lower --batch-size")
        train_set[0, 0], val_set[0, 0]  # fails now if images cannot be read
        saved = load_last(args)
        if WORLD > 1:  # processes that disagree would wait for each other forever
            mine = dict(vars(args), step=saved["step"] if saved else 0)
            everyone = [None] * WORLD
            torch.distributed.all_gather_object(everyone, mine)
            differ = [name for name in mine if any(mine[name] != other[name] for other in everyone)]
            if differ:
                raise ValueError(f"--data, last.pt or settings differ between processes: {differ}")
        if args.wandb and RANK == 0:
            from wandb import init  # only --wandb needs it
            init(project="maskembed", name=os.path.basename(args.out), config=vars(args))
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"maskembed.py: error: {' '.join(str(error).split())}\n")
        sys.exit(2)
    if RANK == 0:
        tag = vit.pretrained_cfg.get("tag") if args.pretrained else "random"
        print(f"{args.model}, weights: {args.checkpoint or tag}, on {device} in {args.dtype}\n"
              f"{len(train_set)} images to train on, {len(val_set)} to validate on, from "
              f"{args.data or 'built-in pictures of letters (--data DIR takes your own)'}\n"
              f"{args.images_per_update} images per update: {WORLD} processes x {args.accum} "
              f"micro-batches x {args.batch_size} images")
    train(model, teacher, train_set, val_set, args, saved)
    if WORLD > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
