"""The site: a page for every notebook, and a listing of what they define.   build.py"""
import ast
import re
import shutil
from pathlib import Path

import nbformat
from nbformat.v4 import new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parents[2]
FIRST, LAST = ("tutorials", "campaign", "twin"), ("benchmarks",) # other folders stand between, by name
LEFT_OUT = ("reports",) # templates, which papermill fills


def notebooks(folder):
    """Its notebooks, in order."""
    return [p for p in sorted(folder.glob("*.ipynb")) if not p.name.startswith((".", "_"))]


def rooms(folder):
    """The folders in it that hold notebooks, in the order in which one reads them."""
    found = [f for f in folder.iterdir() if f.is_dir() and f.name not in LEFT_OUT and not f.name.startswith((".", "_"))]
    place = lambda f: FIRST.index(f.name) if f.name in FIRST else len(FIRST) + (f.name in LAST)
    return sorted((f for f in found if notebooks(f) or rooms(f)), key=lambda f: (place(f), f.name))


def directives(cell):
    """What nbdev is told about a cell, such as {"export": ""}."""
    return dict(re.findall(r"^#\| *(\w+) *(.*)$", cell.source, re.M)) if cell.cell_type == "code" else {}


def read_whole(path):
    """A notebook that is valid and stores no error."""
    nb = nbformat.read(path, 4)
    nbformat.validate(nb)
    for cell in nb.cells:
        if any(o.output_type == "error" for o in cell.get("outputs", [])): raise ValueError(f"an error is stored as the output of cell {cell.id}")
    return nb


def definitions(source):
    """Public functions and classes, with the first line of what each says of itself."""
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node.name, (ast.get_docstring(node) or "").partition("\n")[0]


def to_page(nb):
    """The notebook as one reads it, its module, and its definitions with a label to link to."""
    module, cells, defined = next((d["default_exp"] for d in map(directives, nb.cells) if "default_exp" in d), ""), [], []
    for cell in nb.cells:
        told = directives(cell)
        if told.keys() & {"hide", "default_exp"} or "hide" in cell.metadata.get("tags", []): continue
        if cell.cell_type == "code": cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
        if "export" in told:
            cell.metadata.tags, label = ["export"], f"{module}.{cell.id}"
            cells.append(new_markdown_cell(f"({label})="))
            defined += [(name, words, label) for name, words in definitions(cell.source)]
        cells.append(cell)
    return new_notebook(cells=cells, metadata={**nb.metadata, "language_info": {"name": "python", "pygments_lexer": "ipython3"}}), module, defined


def contents(entries, *options):
    """A table of contents."""
    return new_markdown_cell("\n".join(["```{toctree}", *options, *entries, "```"]))


def write_pages(folder, at, defined):
    """A page for each notebook of a folder; gives the page that leads to the others, if there is one, and the names of these."""
    at.mkdir(parents=True)
    lead, entries = None, []
    for path in notebooks(folder):
        try: page, module, names = to_page(read_whole(path))
        except Exception as e: raise SystemExit(f"FAILED: {path}: {e}") from e
        if names: defined.setdefault(module, []).extend(names)
        if path.stem in ("index", "00_overview"): lead = page
        else: nbformat.write(page, at/path.name); entries.append(path.stem)
    return lead, entries


def write_room(folder, at, defined):
    """The pages of a folder and of the folders in it, below its overview or below a list of them; gives their entry in a table of contents."""
    lead, entries = write_pages(folder, at, defined)
    entries += [write_room(inner, at/inner.name, defined) for inner in rooms(folder)]
    page = lead or new_notebook(cells=[new_markdown_cell(f"# {folder.name.capitalize()}")])
    page.cells.append(contents(entries, ":hidden:" if lead else ":maxdepth: 1"))
    nbformat.write(page, at/"index.ipynb")
    title = re.match(r"# ([^:\n]+)", page.cells[0].source)[1]
    return f"{title} <{folder.name}/index>"


def listing(defined):
    """Every public function and class, by module."""
    plain = lambda s: re.sub(r"([\\|<>*\[\]$`])", r"\\\1", s)
    lines = ["# API", "", "Every function and class of `batt_nb`, module by module, linked to the cell that defines it. A room's public names stand on its first page; cells with a colored bar are what the package consists of."]
    for module in sorted(defined):
        lines += ["", f"## {module}", "", "| name | what it does |", "|---|---|"]
        lines += [f"| [`{name}`](#{label}) | {plain(words)} |" for name, words, label in defined[module]]
    return "\n".join(lines) + "\n"


def write_site(source, pages):
    """All pages, and the front page that leads to them."""
    defined = {}
    front, entries = write_pages(source, pages, defined)
    folders = {f.name: write_room(f, pages/f.name, defined) for f in rooms(source)}
    last = [folders.pop(name) for name in LAST if name in folders]
    package = new_notebook(cells=[new_markdown_cell("# Package\n\nWhat all rooms share, and how they are used together."), contents(entries, ":maxdepth: 1")])
    nbformat.write(package, pages/"package.ipynb")
    (pages/"api.md").write_text(listing(defined), encoding="utf-8")
    front.cells.append(contents([*folders.values(), "package", "api", *last], ":hidden:"))
    nbformat.write(front, pages/"index.ipynb")


def build(source=ROOT/"nbs", work=ROOT/"_proc", site=ROOT/"_docs"):
    """The site, whole or not at all: a warning leaves the one before."""
    from sphinx.cmd.build import main
    shutil.rmtree(work, ignore_errors=True)
    write_site(source, work/"pages")
    if main(["-W", "--keep-going", "-q", "-b", "html", "-c", str(Path(__file__).parent), "-d", str(work/"doctrees"), str(work/"pages"), str(work/"html")]):
        raise SystemExit("FAILED: see the warnings above; no site was written")
    shutil.rmtree(site, ignore_errors=True)
    (work/"html").rename(site)
    return site/"index.html"


if __name__ == "__main__": print(f"site: {build().relative_to(ROOT)}")
