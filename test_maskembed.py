"""What maskembed.py promises, tested on tiny ViTs; no network, no GPU: python -m pytest -q"""
import argparse, contextlib, functools, itertools, json, math, multiprocessing, os, random, re
import shlex, signal, socket, subprocess, sys, tarfile, tempfile, time
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image
from timm.models import Beit, Eva, VisionTransformer
from torchvision.transforms.functional import pil_to_tensor

import maskembed
from maskembed import MaskEmbed, Teacher, mask_pixels, reconstruction_loss, sample_masks

HERE = Path(__file__).resolve().parent
TINY = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=0)
VITS = {
    "clip": lambda: VisionTransformer(**TINY, pre_norm=True, act_layer="quick_gelu", norm_layer=
                                      functools.partial(nn.LayerNorm, eps=1e-5)),
    "siglip": lambda: VisionTransformer(**TINY, class_token=False, global_pool="map"),
    "registers": lambda: VisionTransformer(**TINY, reg_tokens=4, no_embed_class=True, qk_norm=True),
    "gap": lambda: VisionTransformer(**TINY, class_token=False, global_pool="avg", qkv_bias=False),
    "patch14at45": lambda: VisionTransformer(**{**TINY, "img_size": 45, "patch_size": 14}),
    "dynamic": lambda: VisionTransformer(**TINY, dynamic_img_size=True),
    "beit": lambda: Beit(**TINY, use_rel_pos_bias=True, init_values=0.1),
    "eva": lambda: Eva(**TINY, use_rot_pos_emb=True, swiglu_mlp=True),
}


def fill(module, phase):
    """Every parameter from a formula, so that no random state enters."""
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(module.named_parameters())):
            one = p.ndim == 1 and name.endswith("weight") or name.endswith("gamma")
            wave = 0.2 * torch.sin(0.7 * torch.arange(p.numel(), dtype=torch.float64) + i + phase)
            p.copy_((wave + one).reshape(p.shape))
    return module


def tiny(name):
    """A ViT, two images of smooth waves, and three masks of each."""
    vit = fill(VITS[name]().double().eval(), 0)
    size, num_patches = vit.patch_embed.img_size[0], vit.patch_embed.num_patches
    images = 1.5 * torch.sin(0.05 * torch.arange(6 * size * size, dtype=torch.float64))
    m = ((7 * torch.arange(2 * num_patches)) % 5 < 2).double().reshape(2, num_patches)
    masks = torch.stack([m, 1 - m, torch.ones_like(m)], dim=1)
    return vit, images.reshape(2, 3, size, size), masks


# ---- masks
@pytest.mark.parametrize("kind", maskembed.MASKS)
@pytest.mark.parametrize("num_patches", [1, 2, 7, 16, 36, 196, 729])
def test_masks_of_every_kind_and_grid(kind, num_patches):
    for complement, full in itertools.product((False, True), repeat=2):
        m, same, other = (sample_masks(5, num_patches, kind, 0.4, complement, full,
                                       torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert m.shape == (5, 1 + complement + full, num_patches) and m.dtype == torch.float32
        assert set(m.unique().tolist()) <= {0.0, 1.0} and torch.equal(m, same)
        assert num_patches < 9 or not torch.equal(m[:, 0], other[:, 0])
        assert not complement or torch.equal(m[:, 1], 1 - m[:, 0])
        assert not full or (m[:, -1] == 1).all()


def test_mask_distributions():
    draw = functools.partial(sample_masks, generator=torch.Generator().manual_seed(0))
    visible = draw(9000, 8)[:, 0].sum(1).long().bincount(minlength=9)
    assert (visible / 1000 - 1).abs().max() < 0.15  # uniform on 0..8
    for keep in (0.0, 0.1, 0.4, 0.9, 1.0):
        assert abs(draw(500, 196, "bernoulli", keep)[:, 0].mean() - keep) < 0.01
        for num_patches in (1, 4, 9, 16, 36, 196):
            visible = draw(50, num_patches, "blockwise", keep)[:, 0].sum(1)
            assert (visible == math.ceil(keep * num_patches - 1e-6)).all()
    grids = (draw(200, 196, kind, 0.4)[:, 0].view(-1, 14, 14) for kind in maskembed.MASKS[1:])
    points, blocks = (m.diff(dim=1).abs().mean() + m.diff(dim=2).abs().mean() for m in grids)
    assert blocks < 0.4 * points  # in rectangles neighbours seldom differ


def test_mask_pixels_by_hand():
    image, two = torch.arange(1.0, 26).view(1, 1, 5, 5), torch.ones(2, 2)
    masked = mask_pixels(image, torch.tensor([[[1.0, 0, 0, 1]]]), 2)
    assert torch.equal(masked[0], image * torch.block_diag(two, two, torch.zeros(1, 1)))


# ---- teacher, encoder, decoder
@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize("bias", [True, False])
def test_masked_embeddings_equal_masked_pixels(name, bias):
    vit, images, masks = tiny(name)
    if not bias:
        vit.patch_embed.proj.bias = None
    pixels = mask_pixels(images, masks, vit.patch_embed.patch_size).flatten(0, 1)
    for blocks, teacher in ((3, Teacher(vit, skip_blocks=0)), (2, Teacher(vit))):
        vit.blocks = vit.blocks[:blocks]
        timms = vit.fc_norm(vit.forward_features(pixels)).unflatten(0, (2, 3))
        torch.testing.assert_close(teacher(images, masks), timms, rtol=1e-10, atol=1e-10)


ORACLE = {  # from the authors' code, in float64
    "clip": dict(
        target=(0.040345193349, 1.068894249814), prediction=(-0.001899014298, 0.404346847255),
        mse=1.150161963105, cosine=0.784828090710, l1=0.869702745897, masked=0.421253766387,
        unmasked=0.790128763982, gradient=4.097890460436, parameters=73216, uncapped=0.755322188884,
        steps=(1.1501619631, 1.9068529734, 0.9603307935, 0.8098980471)),
    "siglip": dict(
        target=(0.050766139995, 1.047459410078), prediction=(-0.000405711126, 0.347637260223),
        mse=1.367101708899, cosine=1.143634948344, l1=0.934307298180, masked=0.412515835231,
        unmasked=0.954585873668, gradient=6.436986406898, parameters=73088, uncapped=0.565476107103,
        steps=(1.3671017089, 1.6074432401, 0.9082765902, 0.6581726284)),
}


@pytest.mark.parametrize("name", ORACLE)
def test_numbers_of_the_authors_code(name):
    (vit, images, masks), oracle = tiny(name), ORACLE[name]
    model = MaskEmbed(vit, softcap=2.0)
    fill(model.encoder, 1), fill(model.decoder, 2)
    target, prediction = Teacher(vit)(images, masks), model(images, masks)
    near = functools.partial(pytest.approx, rel=1e-6, abs=1e-9)
    for which, tokens in (("target", target), ("prediction", prediction)):
        assert (tokens.mean().item(), tokens.std(correction=0).item()) == near(oracle[which])
    for kind in maskembed.LOSSES:
        assert reconstruction_loss(prediction, target, masks, kind).item() == near(oracle[kind])
    assert sum(p.numel() for p in model.parameters()) == oracle["parameters"]
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.95), weight_decay=0.01)
    for step, expected in enumerate(oracle["steps"]):
        loss = reconstruction_loss(model(images, masks), target, masks)
        assert loss.item() == near(expected)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert step or norm.item() == near(oracle["gradient"])
        optimizer.step()
    plain = MaskEmbed(vit, softcap=0)
    plain.load_state_dict(model.state_dict())
    # The published figures are of the weights after step 3; siglip's is 1.8e-6 from ours, by two
    # digits that look exchanged.
    uncapped = reconstruction_loss(plain(images, masks), target, masks).item()
    assert uncapped == near(oracle["uncapped"], rel=1e-6 if name == "clip" else 2e-6)


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_gradient_flow(name, head):
    vit, images, masks = tiny(name)
    prefix_only = head == "mlp" and vit.num_prefix_tokens > 0
    before = {k: v.clone() for k, v in vit.state_dict().items()}
    teacher = Teacher(vit, prefix_only=prefix_only).train()
    target = teacher(images, masks)
    assert not target.requires_grad and not any(m.training for m in teacher.modules())
    model = MaskEmbed(vit, 0 if name in ("beit", "eva") else 30, head, decoder_width=16,
                      prefix_only=prefix_only)
    optimizer, calls = torch.optim.SGD(model.parameters(), 0.1), []
    for blocks in (model.encoder.blocks, model.decoder.blocks):
        blocks[0].register_forward_pre_hook(lambda *_: calls.append("computed"))
    for step in range(3):
        gradients = []
        for checkpointing in (True, False):  # changes nothing but memory
            model.set_grad_checkpointing(checkpointing)
            optimizer.zero_grad()
            prediction = model(images, masks)
            reconstruction_loss(prediction, target, masks).backward()
            assert len(calls) == (4 if checkpointing else 2)  # twice each, or once
            calls.clear()
            gradients.append({name: p.grad for name, p in model.named_parameters()})
        torch.testing.assert_close(*gradients)
        assert all(gradient is not None for gradient in gradients[0].values())
        trunk = [gradient.abs().max() for name, gradient in gradients[0].items()
                 if name.startswith("encoder.") and "head" not in name]
        assert (max(trunk) > 0) == (step > 0)  # the zero head, once
        optimizer.step()
    num_tokens = vit.num_prefix_tokens + (0 if prefix_only else masks.shape[2])
    assert prediction.shape == target.shape == (2, 3, num_tokens, 32)
    assert all(torch.equal(before[k], v) for k, v in vit.state_dict().items())
    expected = {k for k in before if not k.startswith(("attn_pool", "head"))}
    assert {k for k in model.encoder.state_dict() if not k.startswith("head.")} == expected


def test_hidden_and_prefix_tokens_do_not_reach_the_decoder():
    vit, _, masks = tiny("registers")
    decoder = fill(MaskEmbed(vit).decoder, 2)
    tokens = torch.randn(2, 21, 32, dtype=torch.float64, requires_grad=True)
    for k in range(3):
        prediction = decoder(tokens, masks[:, k:k + 1])
        gradient, = torch.autograd.grad(prediction.square().sum(), tokens)
        seen = gradient.abs().amax(-1) > 0
        assert not seen[:, :5].any() and torch.equal(seen[:, 5:], masks[:, k] == 1)


def test_softcap_limits_logits_and_dynamo_compiles():
    vit, images, masks = tiny("clip")
    tokens = [MaskEmbed(vit, softcap=c).encoder.forward_features(images) for c in (1e6, 0.0, 0.5)]
    torch.testing.assert_close(tokens[0], tokens[1])
    assert (tokens[2] - tokens[1]).abs().max() > 1e-3
    if maskembed.flex_attention:  # the fused path is for CUDA; it runs, forward, on the CPU too
        attention = MaskEmbed(vit, softcap=0.5).float().encoder.blocks[0].attn
        attention.requires_grad_(False)
        x = 3 * torch.randn(2, 17, 32)
        qkv = attention.qkv(x).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        fused = attention.proj(attention.fused(*qkv).transpose(1, 2).flatten(2))
        torch.testing.assert_close(fused, attention(x))
    model, teacher = fill(MaskEmbed(vit), 1), Teacher(vit)
    expected, keys = (model(images, masks), teacher(images, masks)), list(model.state_dict())
    model.compile(backend="eager"), teacher.compile(backend="eager")
    torch.testing.assert_close((model(images, masks), teacher(images, masks)), expected)
    assert keys == list(model.state_dict())


def test_library_refuses_bad_arguments():
    vit, images, masks = tiny("clip")
    for text, call in {
        "0 x 16": lambda: sample_masks(0, 16), "spiral": lambda: sample_masks(2, 16, "spiral"),
        "1.5": lambda: sample_masks(2, 16, keep=1.5),
        "meta": lambda: sample_masks(2, 4, generator=torch.Generator(), device="meta"),
        "-1 of 3": lambda: Teacher(vit, skip_blocks=-1), "-2": lambda: MaskEmbed(vit, softcap=-2),
        "deep": lambda: MaskEmbed(vit, head="deep"),
        "decoder_layers": lambda: MaskEmbed(vit, decoder_layers=0),
        "soft cap.*Eva": lambda: MaskEmbed(tiny("eva")[0]),
        "ending in a LayerNorm": lambda: MaskEmbed(timm.create_model("test_vit4")),
        "Distilled": lambda: Teacher(timm.create_model("deit_tiny_distilled_patch16_224")),
        "MixerBlock|MlpMixer": lambda: MaskEmbed(timm.create_model("mixer_s32_224")),
        "5 prefix tokens, 4": lambda: Teacher(VisionTransformer(
            **{**TINY, "img_size": 16}, reg_tokens=4), prefix_only=True),
        "0 prefix tokens": lambda: MaskEmbed(tiny("gap")[0], prefix_only=True),
        "B > 0": lambda: MaskEmbed(vit)(images[:0], masks[:0]),
        "float64": lambda: MaskEmbed(vit)(images.float(), masks),
        "huber": lambda: reconstruction_loss(masks, masks, masks, "huber"),
    }.items():
        with pytest.raises(ValueError, match=text):
            call()


def test_any_tensors_work_or_are_refused():
    """Everything public that takes tensors, each argument replaced by a wrong one: ValueError."""
    vit, images, masks = tiny("clip")
    teacher, model = Teacher(vit), MaskEmbed(vit)
    tokens = model(images, masks)
    shapes = [lambda x: x[:1], lambda x: x[:0], lambda x: x[:, :0], lambda x: x[0],
              lambda x: x[None], lambda x: x.sum(), lambda x: x[..., 0], lambda x: x.to("meta")]
    grid, dtypes = [lambda x: x[..., :-9]], [torch.Tensor.int, torch.Tensor.bool]
    values = [lambda x, v=v: x.where(x == 0, v) for v in (math.nan, 0.5, 2.0, -1.0, math.inf)]
    for call, arguments, spoil in (
            (teacher, [images, masks], shapes + grid + dtypes),
            (model, [images, masks], shapes + grid + dtypes),
            *((functools.partial(call, images), [masks], values) for call in (teacher, model)),
            (functools.partial(mask_pixels, patch_size=8), [images, masks], shapes + grid),
            *((functools.partial(reconstruction_loss, kind=kind), [tokens, tokens, masks],
               shapes + dtypes) for kind in maskembed.LOSSES)):
        call(*arguments)
        for i, change in itertools.product(range(len(arguments)), spoil):
            wrong = [change(x) if i == j else x for j, x in enumerate(arguments)]
            with pytest.raises(ValueError, match=r"\(.*\)"):
                call(*wrong)


# ---- the program
def small(*words):
    """Words for a run of seconds: 2 x 2 patches, float32."""
    fixed = ("--model test_vit --no-pretrained --img-size 32 --workers 0 --dtype float32 "
             "--num-images 40 --batch-size 8 --epochs 2 --lr 1e-3 --log-every 2")
    return [*fixed.split(), *map(str, words)]


CPU = maskembed.Process(0, 1, torch.device("cpu"), torch.float32, contextlib.nullcontext, [])


def program(*words, cwd, torchrun=()):
    """The real command line, just started."""
    return subprocess.Popen(
        [sys.executable, *torchrun, str(HERE / "maskembed.py"), *map(str, words)], cwd=cwd,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# Runs that take a second: forked from a process that has imported everything, and nothing else.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["maskembed", "torch._dynamo"])


def one_rank(words, rank, world, port, output, fault):
    multiprocessing.set_start_method("fork", force=True)  # for the workers
    torch.set_num_threads(1)
    for number in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    if world > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
    if fault and fault[0] == rank:
        fails(*fault[1:])
    maskembed.main(words)


def launch(*words, world=1, fault=None):
    """main(words) in `world` processes, one with a fault -> exit codes, what was printed."""
    with tempfile.NamedTemporaryFile() as output:
        settings = world, free_port(), output.name, fault
        ranks = [SERVER.Process(target=one_rank, args=(list(map(str, words)), rank, *settings))
                 for rank in range(world)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(60)
        codes = [process.exitcode for process in ranks]
        for process in ranks:
            process.kill()
        text = Path(output.name).read_text()
        assert None not in codes, f"a process did not end within a minute: {text}"
        assert fault or not any(codes), text
        return codes, text


def fails(name, at, how):
    """From its at-th call on, maskembed.NAME goes wrong in this process."""
    original, calls = getattr(maskembed, name), itertools.count(1)
    signals = {"stopped": signal.SIGTERM, "killed": signal.SIGKILL, "half": signal.SIGKILL}
    os.setpgrp()  # what a signal reaches: this process and its workers, as from a terminal

    def failing(*args, **options):
        if next(calls) < at:
            return original(*args, **options)
        if how == "broken":
            raise OSError("cannot read")
        if how == "full":  # the disk: what is written there meets no room
            os.symlink("/dev/full", f"{args[0]}.tmp")
        if how == "half":
            Path(f"{args[0]}.tmp").write_bytes(b"half")
        if how in signals:
            os.killpg(0, signals[how])
        result = original(*args, **options)
        return result * math.nan if how == "nan" else result
    setattr(maskembed, name, failing)


def last(folder, name="last.pt"):
    return torch.load(folder / name, weights_only=True)


def log(folder):
    lines = (folder / "log.jsonl").read_text().splitlines()
    clock = ("speed", "loader", "wait", "tflops")
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def assert_same_run(*folders):
    """Bit for bit: every tensor and number in last.pt and best.pt, the log, the exported ViT."""
    for name in ("last.pt", "best.pt"):
        states = [{k: v for k, v in last(folder, name).items() if k not in ("args", "log")}
                  for folder in folders]
        torch.testing.assert_close(*states, rtol=0, atol=0)
    for content in (
            log, lambda folder: (folder / "encoder" / "model.safetensors").read_bytes(),
            lambda folder: (folder / "encoder" / "config.json").read_bytes(),
            lambda folder: {path.relative_to(folder) for path in folder.rglob("*")}):  # no *.tmp
        one, two = map(content, folders)
        assert one == two


BROKEN = ("truncated.jpg", "text.png", "empty.jpg", "dangling.jpg", "line.png", "bomb.png")


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of 47 pictures and of all that people keep in such folders."""
    folder = tmp_path_factory.mktemp("photos with spaces")
    for i in range(47):
        path = folder / f"class {i % 3}" / f"bild-ä{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        maskembed.Letters(50, 40 + i)[i][0].save(path)
    for mode, name, size in (
            ("CMYK", "cmyk.jpg", (1, 90)), ("P", "p.png", (30, 30)), ("1", "1.png", (9, 9)),
            ("LA", "la.png", (20, 9)), ("RGBA", "a.webp", (9, 20)), ("I;16", "i.png", (20, 20)),
            ("I;16", "i.tif", (20, 20)), ("RGB", "one.PNG", (1, 1)),
            ("RGB", "wide.png", (20000, 300)), ("RGB", "line.png", (20000, 1)),
            ("1", "bomb.png", (20000, 20000))):
        Image.new(mode, size).save(folder / name)
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "green")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    whole = (folder / "class 0" / "bild-ä0.jpg").read_bytes()
    for name, content in {"truncated.jpg": whole[:400], "text.png": b"hello", "empty.jpg": b"",
                          "notes.txt": b"no image"}.items():
        (folder / name).write_bytes(content)
    (folder / "dangling.jpg").symlink_to("nowhere.jpg")
    (folder / "class 0" / "loop").symlink_to(folder)
    return folder


@pytest.mark.parametrize("world, workers, accum, dtype", [
    (1, 0, 1, "float32"), (1, 2, 2, "bfloat16"), (2, 0, 2, "bfloat16"), (2, 2, 1, "float32")])
def test_an_interrupted_run_ends_like_one_that_was_not(world, workers, accum, dtype, photos,
                                                       tmp_path):
    whole, killed, rng = tmp_path / "whole", tmp_path / "killed", random.Random(world + workers)
    run = functools.partial(launch, *small(
        "--data", photos, "--batch-size", 8 // world // accum, "--accum", accum, "--workers",
        workers, "--dtype", dtype, "--save-every", 3, "--mixup", 0.3, "--resume"), world=world)
    run("--out", whole)
    codes, text = run("--out", killed, fault=(world - 1, "update", 4, "stopped"))
    assert codes == [0] * world and "stopped  after step 4 of 14, and saved: to go on" in text
    for fault in ((0, "update", rng.randrange(1, 4), "killed"),  # in the first epoch, and in a save
                  (0, "write_file", rng.randrange(5, 8), "half")):
        codes, text = run("--out", killed, fault=fault)
        assert codes[0] == -signal.SIGKILL and 0 not in codes, text
    assert 6 <= last(killed)["step"] < 14
    with open(killed / "log.jsonl", "a") as file:
        file.write('{"step": 6, "los')
    run("--out", killed)
    assert_same_run(whole, killed)


def test_one_process_equals_two(photos, tmp_path):
    words = small("--data", photos, "--epochs", 3, "--lr", 3e-4, "--mixup", 0.5, "--cutmix", 1)
    for world, batch, accum in [(1, 8, 1), (1, 2, 4), (2, 4, 1), (2, 2, 2)]:
        out = tmp_path / f"{world} {batch}"
        _, text = launch(*words, "--batch-size", batch, "--accum", accum, "--out", out, world=world)
        assert all(1 <= text.count(f"{name}: ") <= world for name in BROKEN), text
        assert "55 to train on, 8 held out" in text
        assert f"global batch 8 = {world} processes x {batch} images x {accum}" in text
        state, first = last(out), last(tmp_path / "1 8")
        assert state["step"] == 21
        for saved in (state, first):  # keys' biases have no effect on a softmax: Adam divides their
            for name, x in saved["model"].items():  # gradient, which is rounding, by its own size
                x.view(3, -1)[1].zero_() if name.endswith("qkv.bias") else None
        torch.testing.assert_close(state["model"], first["model"], rtol=0, atol=1e-6)
        assert 1 != state["scale"] == pytest.approx(first["scale"], rel=1e-6)
        for one, two in zip(log(tmp_path / "1 8"), log(out), strict=True):
            assert one == pytest.approx(two, rel=1e-6, abs=1e-6)


def test_ctrl_c(tmp_path):
    """Of the program in a terminal, workers and all: it saves, and says how to go on."""
    run = program(*small("--epochs", 40, "--workers", 2), "--out", "out", cwd=tmp_path)
    while not (tmp_path / "out" / "patches.png").exists():  # one epoch is over
        assert run.poll() is None
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)
    text, _ = run.communicate(timeout=100)
    step = last(tmp_path / "out")["step"]
    assert run.returncode == 0 and "Traceback" not in text and 0 < step < 160, text
    assert f"stopped  after step {step} of 160" in text and "--resume" in text


@pytest.mark.parametrize("fault, reported", [  # each in step 3 or 4, after the save of step 2
    ((1, "reconstruction_loss", 5, "nan"), "step 4, rank 1:.*--lr"),  # one was a count
    ((0, "write_file", 3, "full"), "last.pt.*No space left"),
    ((1, "read_image", 15, "broken"), "21 images in turn cannot be read")])
def test_faults_leave_the_last_good_checkpoint(fault, reported, tmp_path):
    codes, text = launch(*small("--out", tmp_path, "--epochs", 1, "--save-every", 2,
                                "--batch-size", 4), world=2, fault=fault)
    assert codes[fault[0]] == 2 and 0 not in codes, text
    assert re.search(f"maskembed: .*{reported}", text), text
    assert last(tmp_path)["step"] == 2


def test_two_nodes_restart_by_themselves(tmp_path):
    words = small("--num-images", 400, "--batch-size", 4, "--save-every", 7, "--resume", "--out")
    launch(*words, tmp_path / "whole", world=2)
    torchrun = ("-m torch.distributed.run --nnodes=2 --nproc-per-node=1 --max-restarts=2 "
                "--rdzv-backend=c10d --rdzv-id=test --local-addr=127.0.0.1 "
                f"--rdzv-endpoint=127.0.0.1:{free_port()}")
    nodes = [program(*words, "killed", cwd=tmp_path, torchrun=torchrun.split()) for _ in range(2)]
    while not (tmp_path / "killed" / "last.pt").exists():
        assert nodes[0].poll() is None
        time.sleep(0.02)
    worker = subprocess.run(["pgrep", "-P", str(nodes[1].pid)], capture_output=True, text=True)
    os.kill(int(worker.stdout.split()[-1]), signal.SIGKILL)
    texts = [node.communicate(timeout=150)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], texts
    # Rank 0, on one node before and after, says where each of the two attempts began.
    assert sorted(len(re.findall(r"from step \d+", text)) for text in texts) == [0, 2]
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


class Evil:
    def __reduce__(self):
        return open, ("evil", "w")


def refusal(capsys, *words):
    """The one line that the program has to say to these words before exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        maskembed.main(small(*words))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and len(error) < 600, (words, error)
    return error


def test_resume_refuses_what_does_not_fit(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, path = ["--out", tmp_path], tmp_path / "last.pt"
    maskembed.main(small(*words))
    good, entries = path.read_bytes(), log(tmp_path)
    assert "--resume" in refusal(capsys, *words)
    words.append("--resume")
    assert "lr was 0.001, not 1.0; global_batch was 8, not 16" in refusal(
        capsys, *words, "--lr", 1, "--min-lr", 1e-4, "--accum", 2)
    assert "epochs was 2, not 1" in refusal(capsys, *words, "--epochs", 1)
    free = "--accum 2 --batch-size 4 --workers 1 --save-every 3 --log-every 3 --no-compile"
    Path("last.pt.tmp").write_bytes(b"half")
    maskembed.main(small(*words, *free.split()))  # may change; the run is over, nothing happens
    assert not Path("last.pt.tmp").exists()  # but that what a killed run left is gone
    assert log(tmp_path)[:-1] == entries[:-1] and last(tmp_path)["step"] == 8
    maskembed.main(small(*words, "--epochs", 3))
    assert "stretched from 2 to 3 epochs" in capsys.readouterr().out
    stretched, state = log(tmp_path), last(tmp_path)
    assert stretched[:5] == entries[:5] and len(stretched) == 9 and state["step"] == 12
    for bad in (good[:5000], b"", b"hello", {**state, "model": {}}, {**state, "args": Evil()},
                {"model": state["model"]}, {**state, "optimizer": {}}, [1, 2]):
        path.write_bytes(bad) if isinstance(bad, bytes) else torch.save(bad, path)
        assert re.search("last.pt( does not fit| is not from a run|:)",
                         refusal(capsys, *words, "--epochs", 3)), bad
    assert not Path("evil").exists() and log(tmp_path) == stretched
    for name in ("args.json", "log.jsonl"):
        (tmp_path / name).unlink()
    assert "--resume" in refusal(capsys, "--out", tmp_path)  # there still is last.pt


@pytest.mark.parametrize("model, softcap, frozen", [
    ("test_vit", 0, "--freeze-encoder"), ("beit_base_patch16_224", 0, "--no-freeze-encoder"),
    ("vit_base_patch16_siglip_gap_224", 5, "--no-freeze-encoder")])
def test_exported_encoder_and_checkpoints(model, softcap, frozen, tmp_path, monkeypatch):
    create, shrunk = timm.create_model, dict(depth=2, embed_dim=32, num_heads=2)
    monkeypatch.setattr(timm, "create_model", functools.partial(create, **shrunk))
    maskembed.main(small("--model", model, "--softcap", softcap, "--out", tmp_path, frozen))
    state, images = last(tmp_path)["model"], torch.randn(2, 3, 32, 32)
    torch.manual_seed(0)  # the run's
    vit = maskembed.load_vit(model, False, 32)
    changed = {k for k, v in vit.state_dict().items() if not v.equal(state["encoder." + k])}
    assert (changed == {"norm.weight", "norm.bias"}) == (frozen == "--freeze-encoder")
    trained = MaskEmbed(vit, softcap=softcap)
    trained.load_state_dict(state)
    expected = trained.encoder.fc_norm(trained.encoder.forward_features(images))
    for file in ("last.pt", "encoder"):
        aligned = maskembed.load_aligned(tmp_path / file)
        torch.testing.assert_close(aligned(images), expected)

    # Plain timm, in both ways, with nothing of ours; what it lacks is the soft cap.
    timms = create(model, num_classes=0, global_pool="", img_size=32, **shrunk,
                   checkpoint_path=str(tmp_path / "encoder" / "model.safetensors")).eval()(images)
    assert (timms - expected).norm() < 0.02 * expected.norm()
    if timm.__version__ >= "1.0.26":  # older ones cannot read safetensors in a folder
        folder = create(f"local-dir:{tmp_path / 'encoder'}", pretrained=True).eval()
        torch.testing.assert_close(folder(images), timms)
    config = json.loads((tmp_path / "encoder" / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert config["pretrained_cfg"]["mean"] == list(vit.pretrained_cfg["mean"])
    stated = config["maskembed"]["difference"]  # of random weights: mostly the final norm's eps
    assert 0 < stated < 0.02 and stated == log(tmp_path)[-1]["plain_timm"]

    # The authors' layout: wrappers' prefixes, a Namespace, their name for a soft-capped model.
    name, path = model.replace("vit_", "svit_", 1) if softcap else model, tmp_path / "authors.pth"
    keys = {"module._orig_mod." + k: v for k, v in state.items()}
    settings = argparse.Namespace(img_size=32, model=name)
    torch.save(dict(state_dict=keys, args=settings, arch=name), path)
    theirs = maskembed.load_aligned(path)
    assert {getattr(block.attn, "softcap", 0) for block in theirs.blocks} == {30 * (softcap > 0)}
    # Any of these files starts a new run; strictly.
    for vit in (theirs, maskembed.load_vit(model, True, 32, path)):
        torch.testing.assert_close(vit.state_dict(), aligned.state_dict())
    with pytest.raises(ValueError, match="does not fit"):
        maskembed.load_vit(model, True, 64, tmp_path / "last.pt")


def test_any_arguments_work_or_are_refused():
    """Random flags with random values: settings, or one line."""
    flags = re.findall(r'add_argument\("(--[a-z-]+)"', (HERE / "maskembed.py").read_text())
    values = ["0", "1", "-1", "2", "0.5", "1e400", "nan", "x", "", " ", "é", "\0", "9" * 30, "-9",
              "1e-3", "mse", "uniform", "mlp", "--", "--lr", "float32", "[]", "None", "--help"]
    rng, taken = random.Random(0), 0
    for _ in range(3000):
        words = [rng.choice(rng.choice((flags, values)) if rng.random() < 0.2 else usual)
                 for _ in range(rng.randint(1, 3)) for usual in (flags, values)]
        try:
            args = maskembed.parse_args(words)
            assert args.keep <= 1 <= args.batch_size and args.lr < math.inf and args.seed <= 2 ** 31
            taken += 1
        except maskembed.InputError as error:
            assert str(error).strip()
        except SystemExit as stop:
            assert stop.code == 0 and {"-h", "--help"} & set(words)
    assert 100 < taken < 2900


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("cut.pt").write_bytes(b"PK\x03\x04")
    torch.save({"model": Evil()}, "evil.pt")
    torch.save({"encoder.norm.weight": torch.ones(3)}, "other.pt")
    hub = maskembed.huggingface_hub.constants
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    for words, text in {
        "--model vit_base_patch61_224": "vit_base_patch16_224", "--model resnet18": "no plain ViT",
        "--model vit_tiny_patch16_224 --pretrained --img-size 64": "--no-pretrained",
        "--model vit_tiny_patch16_224.no_such_tag --pretrained": "no_such_tag",
        "--model beit_base_patch16_224": "softcap 0",
        "--model vit_base_patch16_siglip_224 --prefix-only --img-size 32": "prefix",
        "--data nowhere": "nowhere", "--data empty": "empty", "--data wds/images": "wds/images",
        "--num-images 8": "7 images to train on", "--keep nan": "--keep", "--keep 0.4": "uniform",
        "--batch-size 0": "--batch-size", "--softcap -1": "--softcap", "--demo --accum 2": "--demo",
        "--img-size 33": "--img-size 33", "--img-size 8": "--img-size 8",
        "--skip-blocks 6": "skip_blocks 6", "--decoder-width 63": "63", "--softcap x": "--softcap",
        "--lr 1 --min-lr 2": "--min-lr", "--warmup-epochs 2": "--warmup-epochs", "--nope": "--nope",
        "--dtype float16": "not for cpu", "--out cut.pt/x": "cannot write",
        "--checkpoint none.pt": "none.pt", "--checkpoint cut.pt": "cut.pt",
        "--checkpoint evil.pt": "evil.pt", "--checkpoint other.pt": "does not fit",
        "--auto-augment best": "best", "--wandb p": "wandb",
    }.items():
        if "float16" not in words or not torch.cuda.is_available():  # a fine choice there
            assert text in refusal(capsys, "--out", "out", *words.split()), words
    assert hub.HF_HUB_OFFLINE  # its client, which would try again for a minute, was not let to
    assert not Path("evil").exists() and not Path("out").exists()
    real = program("--nope", cwd=tmp_path)
    assert real.communicate()[0].count("\n") == 1 and real.returncode == 2


def test_wandb_gets_settings_values_and_picture(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = program(*small("--out", "out", "--wandb", "masks"), cwd=tmp_path)
    text, _ = run.communicate(timeout=170)
    assert run.returncode == 0, text
    recorded, = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = recorded.read_bytes()
    for name, value in (pair for entry in log(tmp_path / "out") for pair in entry.items()):
        assert name.encode() in content and json.dumps(value).encode() in content
    assert b"num_images" in content and b"masks" in content  # settings, project
    assert list((tmp_path / "wandb").glob("offline-run-*/files/media/images/patches*.png"))


def test_transformers_opens_the_exported_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    maskembed.main(small("--out", tmp_path))
    images = torch.randn(2, 3, 32, 32)
    tokens = transformers.AutoModel.from_pretrained(tmp_path / "encoder")(images).last_hidden_state
    aligned = maskembed.load_aligned(tmp_path / "encoder")(images)
    assert (tokens - aligned).norm() < 0.02 * aligned.norm()


def test_data_layouts_and_options(tmp_path):
    """The other ways into the program: splits, a tar, mask kinds, losses, augmentations, bf16."""
    split, vit = tmp_path / "split", timm.create_model("test_vit", img_size=32)
    for place, count in {"train": 30, "val": 9}.items():
        (split / place).mkdir(parents=True)
        for i in range(count):
            maskembed.Letters(50)[i][0].save(split / place / f"{i}.{'png' if i else 'webp'}")
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(split / "train", "images")
    for words, *sizes, of in (  # the last: how many images the held-out ones are taken from
            (("--data", split), 30, 9, 9), (("--data", tmp_path / "photos.tar"), 22, 8, 30),
            (("--num-images", 1000), 990, 10, 1000), (("--num-images", 9), 8, 1, 9),
            (("--num-images", 100, "--batch-size", 32), 68, 32, 100),
            (("--num-images", 60, "--batch-size", 32), 32, 28, 60)):
        train, val = maskembed.open_images(maskembed.parse_args(small(*words)), vit)
        assert [len(train), len(val)] == sizes
        assert val.indices.tolist() == [i * of // len(val) for i in range(len(val))]
        assert of == len(val) or not {*train.indices} & {*val.indices}
        for data in (train, val):
            image, problem, *_ = data[0, 0]
            assert image.shape == (3, 32, 32) and problem == ""
            assert torch.equal(image, data[0, 0][0])  # every time
        assert not torch.equal(train[0, 0][0], train[1, 0][0])
    for i, more in enumerate((
            "--mask-kind blockwise --keep 0.4 --no-complement --no-full --loss l1 --dtype auto",
            "--prefix-only --skip-blocks 0 --loss masked --cutmix 1 --head mlp --decoder-width 32",
            "--mixup 0.5 --auto-augment rand-m9-mstd0.5-inc1 --dtype bfloat16")):
        out = tmp_path / str(i)
        maskembed.main(small("--data", split, "--out", out, *more.split()))
        assert all(math.isfinite(e.get("loss", 0)) for e in log(out)) and last(out)["step"] == 8
        assert last(out)["args"]["dtype"] in ("float32", "bfloat16", "float16")
    maskembed.Letters(50)[40][0].save(split / "train" / "new.png")
    with pytest.raises(ValueError, match=r"holds \[31, 9\] images, and held \[30, 9\]"):
        maskembed.run(maskembed.parse_args(
            small("--data", split, "--out", out, *more.split(), "--resume")))
    for path in sorted((split / "train").iterdir())[:20]:
        path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="images are broken"):
        maskembed.run(maskembed.parse_args(small("--data", split, "--out", tmp_path / "broken")))


def test_accumulation_is_the_mean():
    """AdamW and clipped gradients would hide another factor; SGD tells."""
    vit = timm.create_model("test_vit", img_size=32)
    teacher, images, masks = Teacher(vit), torch.randn(8, 3, 32, 32), sample_masks(8, 4)
    scaler, whole = torch.amp.GradScaler("cpu", enabled=False), fill(MaskEmbed(vit), 1)
    loss = reconstruction_loss(whole(images, masks), teacher(images, masks), masks)
    loss.backward()
    for accum in (1, 4):
        model, words = MaskEmbed(vit), small("--accum", accum, "--clip-grad", 0)
        sgd = torch.optim.SGD(fill(model, 1).parameters(), 0.1)
        batches = zip(images.chunk(accum), masks.chunk(accum))
        alone = []  # micro-batches whose gradients are not averaged over processes: all but one
        model.no_sync = lambda: contextlib.nullcontext(alone.append(1))
        mean = maskembed.update(model, teacher, batches, sgd, scaler,
                                maskembed.parse_args(words), CPU._replace(world=2))
        assert len(alone) == accum - 1
        torch.testing.assert_close(mean, loss.detach())
        for p, before in zip(model.parameters(), whole.parameters()):
            torch.testing.assert_close(p, before - 0.1 * before.grad, rtol=1e-4, atol=1e-6)


def test_masks_depend_on_seed_epoch_and_step():
    vit, drawn = timm.create_model("test_vit", img_size=32), []
    for seed, key, step in ((0, (0,), 0), (1, (0,), 0), (0, (1,), 0), (0, (0,), 1), (0, (), 0)):
        args = maskembed.parse_args(small("--seed", seed))
        data = maskembed.open_images(args, vit)[0]
        masks, same = (next(maskembed.load(data, [range(8)], key, 196, args, CPU, step))[1]
                       for _ in range(2))
        assert torch.equal(masks, same) and not any(torch.equal(masks, m) for m in drawn)
        drawn.append(masks)


def test_measured_scale():
    args, vit = maskembed.parse_args(small()), timm.create_model("test_vit", img_size=32)
    vit.norm.bias.data += 1  # a mean that counts
    val, teacher = maskembed.open_images(args, vit)[1], Teacher(vit)
    maskembed.measure_scale(teacher, val, args, CPU)
    images, masks = next(maskembed.load(val, [range(len(val))], (), 4, args, CPU))
    assert teacher(images, masks).std(correction=0).item() == pytest.approx(1, rel=1e-4)


def test_learning_rate():
    rates = [maskembed.learning_rate(step, 110, 10, 1.0, 0.1) for step in range(111)]
    assert (rates[0], rates[10], rates[60], rates[110]) == pytest.approx((0.1, 1.0, 0.55, 0.1))
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_letters_and_their_labels():
    for size in (5, 224, 48):
        image, ink = maskembed.Letters(9, size, seed=3)[7]
        assert image.size == ink.size == (size, size) and image.mode == "RGB"
        assert (image, ink) == maskembed.Letters(20, size, seed=3)[7]
    assert image != maskembed.Letters(9, size, seed=4)[7][0]
    colours = pil_to_tensor(image)[:, pil_to_tensor(ink)[0] > 0]
    assert ((colours < 60) | (colours > 195)).float().mean() > 0.8  # strong where the ink is
    inks = torch.cat([pil_to_tensor(maskembed.Letters(99)[i][1]) for i in range(99)])
    labels = maskembed.patch_labels(inks, 8).view(-1, 1)
    patches = inks.long().view(99, 6, 8, 6, 8).transpose(2, 3).reshape(-1, 64)
    amounts = nn.functional.one_hot(patches, 9).sum(1).float()
    amounts[:, 0] = 3.5  # background, unless a letter has a sixteenth of the patch
    assert torch.equal(amounts.gather(1, labels)[:, 0], amounts.amax(1))
    assert set(labels.unique().tolist()) == set(range(9))


def test_probe_near_chance_and_near_one():
    g = torch.Generator().manual_seed(0)
    labels, test_labels = (torch.randint(9, (200, 36), generator=g) for _ in range(2))
    known, new = (nn.functional.one_hot(y, 9).float() for y in (labels, test_labels))
    read, iou, recall = maskembed.probe(known, labels, new, test_labels)
    assert iou > 0.99 and recall > 0.99 and (read == test_labels).float().mean() > 0.99
    shuffled = labels.flatten()[torch.randperm(7200, generator=g)].view(200, 36)
    _, iou, recall = maskembed.probe(known, shuffled, new, test_labels)
    assert iou < 0.1 and recall < 0.2  # chance: 1/17 and 1/9


def test_demo_of_20_steps(tmp_path):
    _, text = launch("--demo", "20", "--out", tmp_path)
    entries = log(tmp_path)
    assert [e["name"] for e in entries] == [
        "pretraining", *(f"teacher, block {i}" for i in (1, 2, 3, 4)), "aligned", "control"]
    assert all(f"{e['name']:24} mean IoU {e['iou']:.3f}" in text for e in entries[1:])
    assert entries[-2]["iou"] != entries[-1]["iou"]  # they begin alike: the masks make a difference
    launch("--demo", "20", "--out", tmp_path)  # its own folder, once more:
    assert log(tmp_path) == entries  # the same seed gives the same figures
    picture = pil_to_tensor(Image.open(tmp_path / "patches.png"))
    assert picture.shape == (3, 40 + 6 + 6 * 134 + 36, 6 + 6 * 134)
    panels = [picture[:, 46:46 + 6 * 134, 6 + 134 * i:134 + 134 * i] for i in range(6)]
    assert not any(torch.equal(*pair) for pair in itertools.combinations(panels, 2))
    assert len(panels[1].flatten(1).unique(dim=1).T) <= 10  # class colours, and the white between
    assert (tmp_path / "aligned" / "patches.png").exists()


@pytest.mark.skipif(timm.__version__ < "1.0.26", reason="reads no safetensors in a folder")
def test_every_snippet_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (HERE / "README.md").read_text()
    command, = re.findall(r"maskembed.py (--model test_vit .*)", text)[:1]
    maskembed.main([*command.split(), "--num-images", "64", "--workers", "0"])
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == 3
    for snippet in snippets:
        exec(snippet, {})


def test_every_command_of_configs_md():
    text, folders = (HERE / "configs.md").read_text(), set()
    commands = re.findall(r"(?:^|\| )`((?:torchrun|python) [^`]*)`(?:$| \|)", text, re.MULTILINE)
    assert len(commands) == 47
    for command in commands:
        args = maskembed.parse_args(shlex.split(command.split("maskembed.py")[1]))
        assert args.checkpoint or args.model in timm.list_pretrained(), args.model
        processes = int((re.findall(r"--nproc-per-node=(\d+)", command) or [1])[0])
        assert processes * args.batch_size * args.accum == 1024, command
        folders.add(args.out)
    assert len(folders) == len(commands)  # no recipe would run into another's folder
