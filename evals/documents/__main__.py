"""Write every block of README.md and docs/*.md, and the plots."""

from . import TABLES, evidence, picture
from .fill import DOCUMENTS, ROOT, fill


def main() -> None:
    """Says which files changed."""
    for path in DOCUMENTS:
        old = path.read_text(encoding="utf8")
        new = fill(old, TABLES)
        if new != old:
            path.write_text(new, encoding="utf8")
            print(f"wrote {path.relative_to(ROOT)}")
    if picture.drawn() != picture.series():
        picture.draw()
        print(f"wrote {picture.FILE.relative_to(ROOT)}")
    for name in evidence.measured():
        if evidence.drawn(name) != evidence.digest(name):
            print(f"wrote {evidence.draw(name).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
