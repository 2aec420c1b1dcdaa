"""The Markdown table of all records."""

from accelerator_parts.plan import DONE, Record

KERNEL_CHARACTERS = 70


def markdown(records: list[Record]) -> str:
    """Returns the machine, a row for each figure, and the kernels of the profiled dispatch."""
    lines = ["| measurement | what | figure | compiled in | notes |", "|---|---|---|---|---|"]
    for record in records:
        figures = record.get("figures", [])
        lines += [_row(record["name"], figure) for figure in figures]
        if record["status"] != DONE:
            notes = ": ".join(filter(None, [record["reason"], record.get("problem", "")]))
            lines.append(f"| {record['name']} | **{record['status']}** | | | {_cell(notes)} |")
    return "\n".join([*_machine(records), *lines, *_kernels(records), ""])


def _row(name: str, figure: dict) -> str:
    compiled = f"{figure['compile_s']:.1f} s" if figure.get("compile_s") else ""
    value = f"{number(figure['value'])} {figure['unit']}".strip()
    return f"| {name} | {_cell(figure['what'])} | {value} | {compiled} | {_cell(figure.get('notes', ''))} |"


def number(value: float) -> str:
    """Returns a number with three or four digits."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _machine(records: list[Record]) -> list[str]:
    details = [d for record in records if record["name"] == "machine" for d in record.get("details", [])]
    if not details:
        return []
    device, versions = details[0]["device"], details[0]["versions"]
    parts = [
        f"{device['count']} × {device['kind']} ({device['platform']})",
        f"driver {details[0]['driver']}",
        f"{details[0]['cpu']['usable_cores']} cores, {details[0]['cpu']['model']}",
        f"jax_default_matmul_precision {details[0]['matmul_precision']}",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    return ["; ".join(parts), ""]


def _kernels(records: list[Record]) -> list[str]:
    kernels = [
        kernel
        for record in records
        if record["name"] == "profile"
        for details in record.get("details", [])
        for kernel in details["kernels"]
    ]
    if not kernels:
        return []
    lines = ["", "| kernel of the profiled dispatch | ms | share | times |", "|---|---|---|---|"]
    for kernel in kernels:
        name = _cell(kernel["name"][:KERNEL_CHARACTERS])
        lines.append(f"| `{name}` | {kernel['ms']:.3f} | {kernel['share']:.1%} | {kernel['count']} |")
    return lines
