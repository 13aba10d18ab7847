"""The Markdown tables of docs/scaling.md: what `scaling.py` has measured, and what a plan makes of it.

Each row of the plan says where it comes from: a key of results/scaling.json, a published figure of PUBLISHED, an assumption of ASSUMED, or
arithmetic on rows above it.
"""

from pathlib import Path
from typing import Any

IMAGES, GPUS, BATCH, NODE = 10**9, 64, 4096, 8
NETWORK, DIVERGENCE_NFE, PAGE, UNIT = "ddpmpp-deep", 24, 50_000, 1024
PUBLISHED = {
    "peak": 989e12,  # FLOP a second, H100 SXM, bfloat16, dense: NVIDIA H100 datasheet (1,979 with sparsity)
    "memory": 3.35e12,  # bytes a second of its HBM3: the same
    "network": 50e9,  # bytes a second a GPU and direction: DGX H100, eight 400 Gb/s ports for eight GPUs: NVIDIA DGX BasePOD reference
    "inode": 16384,  # bytes of disk for each inode that mke2fs makes by default: mke2fs.conf(5), inode_ratio
}
ASSUMED = 0.3  # of the peak that the network reaches
Row = tuple[str, ...]


def amount(value: float, unit: str = "") -> str:
    """1.23 G and the like."""
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def span(seconds: float) -> str:
    """Seconds in the unit that reads best."""
    for size, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {name}"
    if seconds >= 0.1:
        return f"{seconds:.3g} s"
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-4 else f"{1e6 * seconds:.3g} µs"


def table(header: Row, rows: list[Row]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(found: dict[str, Any]) -> list[str]:
    """All of them, in the order of the page."""
    return [speedup(found), *measured(found), training(found), sampling(found), likelihood(found), evaluate(found)]


def fill(page: Path, text: list[str]) -> None:
    """Put each table where the page has one with the same header."""
    lines = page.read_text().splitlines()
    for each in text:
        new = each.splitlines()
        starts = [i for i, line in enumerate(lines) if line == new[0]]
        if len(starts) != 1:
            raise SystemExit(f"{page} has {len(starts)} tables that begin {new[0]!r}; wanted one")
        end = next((i for i in range(starts[0], len(lines)) if not lines[i].startswith("|")), len(lines))
        lines[starts[0] : end] = new
    page.write_text("\n".join(lines) + "\n")


# --- measured ------------------------------------------------------------------------------------------------------------
def _ratio(part: dict[str, float]) -> str:
    return f"{part['ratio']:.2f} ({part['lowest']:.2f} .. {part['highest']:.2f})"


def speedup(found: dict[str, Any]) -> str:
    fit, rows = found["training"], list[Row]()
    rate = {k: (2 if "twice" in k or "apart" in k else 1) * fit["batch"] / s for k, s in fit["seconds a step"].items()}
    for kind, name, other in (
        ("strong", f"the same batch of {fit['batch']}", "two"),
        ("weak", "twice the batch", "two, twice the batch"),
        ("apart", "each its own, no word between them", "two, apart"),
    ):
        rows.append((f"training, {name}", amount(rate["one"]), amount(rate[other]), _ratio(fit[kind]), "–"))
    for name in ("sampling", "likelihood", "evaluate"):
        part = found[name]
        one, two = (amount(part["a second"][k]) for k in ("one", "two"))
        rows.append((name, one, two, _ratio(part["steady"]), f"{_ratio(part['whole'])}, {part['n'][1]:,} images"))
    header = ("what", "images a second, one", "two", "two / one", "the whole command")
    return table(header, rows)


def measured(found: dict[str, Any]) -> list[str]:
    nets = [
        (f"`{name}`", f"{row['parameters']:,}", amount(row["forward"]), amount(row["training"]))
        for name, row in found["networks"].items()
        if isinstance(row, dict)
    ]
    words, rows = found["words"], list[Row]()
    put = lambda what, value, key: rows.append((what, value, f"`{key}`"))
    for name in ("numbers", "objects", "barrier", "claim"):
        put(f"`group.{name}`, two processes", span(words[name]), f"words.{name}")
    for name, part in words.items():
        if name.startswith("all-reduce"):
            speed = amount(part["bytes"] / part["seconds"], "B/s")
            put(
                f"sum of {amount(part['bytes'], 'B')} of gradients over gloo, loopback",
                f"{span(part['seconds'])}, {speed}",
                f"words.{name}",
            )
    fit = found["training"]
    sent = f"{amount(fit['bytes sent a step'], 'B')} of {amount(fit['gradient bytes'], 'B')} of gradients"
    put("bytes that two processes send in a step, together", sent, "training.bytes sent a step")
    put("gathers of a few numbers in a step of `fit`", f"{fit['gathers a step']:g}", "training.gathers a step")
    for name, part in found["steps"].items():
        if not isinstance(part, dict):
            continue
        kept = part["checkpoint"]
        put(f"a step of `{name}`, {part['batch']} images, one thread", span(part["seconds"]), f"steps.{name}.seconds")
        write = f"{amount(kept['bytes'], 'B')}, {span(kept['write seconds'])}, {span(kept['read seconds'])}"
        put(f"checkpoint of `{name}`, one average: size, writing, reading", write, f"steps.{name}.checkpoint")
    drawn = found["drawing"]
    for side in (32, 64):
        whole, share = (drawn[f"3x{side}x{side}, {name}"]["noise"] for name in ("whole", "share"))
        text = f"noise of {drawn['images']:,} images 3x{side}x{side} on one thread, and of a 64th of them"
        put(text, f"{span(whole)}, {span(share)}", f"drawing.3x{side}x{side}")
    read = found["reading"]
    for name in ("as it is", "MADV_RANDOM"):
        part = read[f"cold, {name}"]
        value = f"{amount(part['images a second'])} images/s, {amount(part['disk bytes an image'], 'B')} of disk each"
        put(f"3x32x32 out of an .npy file that is not in memory, {name}", value, f"reading.cold, {name}")
    for n in (0, 2):
        value = f"{amount(read[f'cached, {n} workers']['images a second'])} images/s"
        put(f"the same in memory, {n} workers", value, f"reading.cached, {n} workers")
    put("SHA-256 of the data", amount(read["sha256, bytes a second"], "B/s"), "reading.sha256, bytes a second")
    for name, part in found["files"].items():
        if not isinstance(part, dict) or "missing" in part:
            continue
        png = f"{part['png bytes']:.0f} B ({part['png bytes on disk']:.0f} B on the disk), {span(part['png seconds'])}"
        put(f"a PNG file of {name}, {part['raw bytes']} B raw, and writing it", png, f"files.{name}")
        npz = f"{part['npz bytes']:.0f} B, {span(part['npz seconds'])}"
        put(f"its share of an npz file of {part['npz of']}", npz, f"files.{name}")
    for name in ("sampling", "likelihood"):
        put(f"a row of the table of {name}", f"{found[name]['bytes a row']:.0f} B", f"{name}.bytes a row")
    for name, part in found["merging"].items():
        if isinstance(part, dict):
            value = ", ".join(
                [amount(part["bytes"], "B"), *(span(part[f"{word} seconds"]) for word in ("update", "put", "take", "merge"))]
            )
            put(f"statistics of 1,024 rows, {name}: size; making, writing, reading, adding", value, f"merging.{name}")
            put(f"Fréchet distance, {name}", span(part["distance seconds"]), f"merging.{name}.distance seconds")
    return [
        table(("network", "parameters", "FLOP of an image, forward", "in training"), nets),
        table(("bytes and seconds", "measured", "key"), rows),
    ]


# --- the plan ------------------------------------------------------------------------------------------------------------
def _net(found: dict[str, Any], side: int) -> dict[str, Any]:
    return found["networks"][f"{NETWORK}, 3x{side}x{side}"]


def _seconds(flop: float) -> float:
    """Of one GPU."""
    return flop / (ASSUMED * PUBLISHED["peak"])


def training(found: dict[str, Any]) -> str:
    """A pass over the data."""
    sides, columns = (32, 64), list[list[str]]()
    read, words = found["reading"], found["words"]
    for side in sides:
        net, raw = _net(found, side), 3 * side * side
        step = _seconds(net["training"] * BATCH / GPUS)
        reduce = 2 * (GPUS - 1) / GPUS * 4 * net["parameters"] / PUBLISHED["network"]
        gather = (found["training"]["gathers a step"] + 1) * (GPUS - 1) * words["numbers"]
        cold, random = (read[f"cold, {name}"]["disk bytes an image"] for name in ("as it is", "MADV_RANDOM"))
        noise = found["drawing"][f"3x{side}x{side}, whole"]["noise"] * BATCH / found["drawing"]["images"]
        kept = found["steps"][NETWORK]["checkpoint"]
        columns.append([
            amount(IMAGES * raw, "B"), f"{IMAGES / BATCH:,.0f}", amount(net["training"] * BATCH / GPUS), span(step), span(reduce),
            span(gather), f"{span(4 * BATCH * raw / PUBLISHED['memory'])}; {span(noise)}", amount(BATCH * raw / step, "B/s"),
            *(f"{amount(BATCH * max(each, raw) / step, 'B/s')}" for each in (cold, random)), amount(BATCH / step / GPUS),
            amount(20 * net["parameters"], "B"), f"{amount(kept['bytes'], 'B')}, {span(kept['write seconds'])}",
            span(IMAGES / BATCH * step),
        ])  # fmt: skip
    names = [
        ("data", "10⁹ images, uint8"), ("steps a pass", "10⁹ / 4,096"), ("FLOP a step and GPU", "`networks`, 64 images"),
        ("network, a step", f"assumed: {ASSUMED:.0%} of 989 TFLOP/s (published)"),
        ("sum of gradients, a step", "`networks`.parameters in float32 around a ring, 50 GB/s (published)"),
        ("gathers of a few numbers, a step", "(`training.gathers a step` + 1 of `train`) × 63 × `words.numbers`: a ring over gloo"),
        ("noise of the whole batch: GPU; CPU", "writing it at 3.35 TB/s (published); `drawing`, one thread"),
        ("read a second, all GPUs, as stored", "batch / network's step"), ("from a cold disk, as it is", "`reading.cold, as it is`"),
        ("from a cold disk, MADV_RANDOM", "`reading.cold, MADV_RANDOM`"),
        ("images a second and process", "`reading.cached` has what one thread gives"),
        ("network, gradients, Adam, an average on each GPU", "5 numbers of 4 B a parameter; activations not counted"),
        ("a checkpoint, and writing it while all wait", f"`steps.{NETWORK}.checkpoint`, this machine's disk"),
        ("a pass over the data", "steps × network's step, nothing else in the way"),
    ]  # fmt: skip
    rows = [(name, *(column[i] for column in columns), source) for i, (name, source) in enumerate(names)]
    return table(("training", "3x32x32", "3x64x64", "from"), rows)


def sampling(found: dict[str, Any]) -> str:
    net, kept = _net(found, 32), found["files"].get("CIFAR-10", {})
    kept = kept if "png bytes" in kept else found["files"]["noise"]
    rows: list[Row] = []
    for nfe in (18, 35):
        flop = net["forward"] * nfe * IMAGES
        rows.append(
            (
                f"NFE {nfe}, 64 GPUs",
                f"{amount(flop)}FLOP, {span(_seconds(flop) / GPUS)}",
                f"`networks`; assumed {ASSUMED:.0%} of the peak",
            )
        )
    png, disk, npz = IMAGES * kept["png bytes"], IMAGES * kept["png bytes on disk"], IMAGES * kept["npz bytes"]
    each = IMAGES / GPUS
    rows += [
        ("PNG: files", f"{IMAGES:,}, in {IMAGES // 1000:,} folders", "a file a sample, a folder a thousand"),
        ("PNG: bytes", f"{amount(png, 'B')}, {amount(disk, 'B')} on the disk", "`files`"),
        ("PNG: disk that ext4 wants for as many inodes", amount(IMAGES * PUBLISHED["inode"], "B"), "one in 16 KiB (published)"),
        ("PNG: writing, a 64th of them a process", span(each * kept["png seconds"]), "`files.png seconds`, this machine's disk"),
        ("npz of 1,024: files", f"{-(-IMAGES // 1024):,}", "a file a batch"),
        ("npz: bytes", amount(npz, "B"), "`files`"),
        ("npz: writing, a 64th a process", span(each * kept["npz seconds"]), "`files.npz seconds`, of batches of 64"),
        ("tables", f"{amount(IMAGES * found['sampling']['bytes a row'], 'B')} in {IMAGES // PAGE:,} pages", "`sampling.bytes a row`"),
    ]  # fmt: skip
    return table(("sampling 10⁹ images 3x32x32", "what", "from"), rows)


def likelihood(found: dict[str, Any]) -> str:
    a, b = found["sampling"], found["likelihood"]
    dearer = (a["a second"]["one"] * a["nfe"]) / (b["a second"]["one"] * b["nfe"])
    flop = _net(found, 32)["forward"] * DIVERGENCE_NFE * IMAGES * dearer
    digest, assumed = found["reading"]["sha256, bytes a second"], f"assumed {ASSUMED:.0%} of the peak"
    rows = [
        ("an evaluation with its divergence, in plain ones", f"{dearer:.2f}", "`sampling` and `likelihood`, a second and NFE, one thread"),
        (f"NFE {DIVERGENCE_NFE}, 64 GPUs", f"{amount(flop)}FLOP, {span(_seconds(flop) / GPUS)}", f"`networks`, the line above; {assumed}"),
        ("SHA-256 of the data before the first image, in each process", span(IMAGES * 3072 / digest), "`reading.sha256`, one thread"),
        ("table", f"{amount(IMAGES * b['bytes a row'], 'B')} in {IMAGES // PAGE:,} pages", "`likelihood.bytes a row`"),
    ]  # fmt: skip
    return table(("likelihood of 10⁹ images 3x32x32", "what", "from"), rows)


def evaluate(found: dict[str, Any]) -> str:
    units, columns = -(-IMAGES // UNIT), list[list[str]]()
    parts = {name: part for name, part in found["merging"].items() if isinstance(part, dict)}
    for part in parts.values():
        columns.append([
            f"{units:,}", span(units / GPUS * part["update seconds"]), amount(units * part["bytes"], "B"),
            span(units / GPUS * part["put seconds"]), span(units * (part["take seconds"] + part["merge seconds"])),
            span(part["distance seconds"]), span(IMAGES * 3072 / found["reading"]["sha256, bytes a second"]),
        ])  # fmt: skip
    names = [
        ("units of 1,024", "10⁹ / 1,024"), ("making them, a 64th a process, one thread", "`merging.update seconds`"),
        ("bytes that they are written and read as", "`merging.bytes`"),
        ("writing them, a 64th a process", "`merging.put seconds`, this machine's disk"),
        ("reading and adding them, the first process alone", "`merging.take seconds`, `merging.merge seconds`"),
        ("the distance, the first process alone", "`merging.distance seconds`"),
        ("SHA-256 of a reference of 3.07 TB, the first process alone", "`reading.sha256`"),
    ]  # fmt: skip
    rows = [(name, *(column[i] for column in columns), source) for i, (name, source) in enumerate(names)]
    return table(("evaluating 10⁹ images", *parts, "from"), rows)
