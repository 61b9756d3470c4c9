"""Makes one silo folder per domain of a labelled corpus, for ``seqr demo --data``.

    python benchmarks/split_domains.py CLINC150 ten-silos --rows 200
    seqr demo --data ten-silos

The first ``rows`` training rows of each domain, in file order, and all of its test rows. Rows without a domain
(clinc150's "oos") belong to nobody and are left out.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path


def by_domain(file: Path) -> dict[str, list[str]]:
    """The lines of a JSON Lines file by their ``domain``."""
    rows: dict[str, list[str]] = defaultdict(list)
    for line in file.read_text("utf-8").splitlines():
        domain = json.loads(line).get("domain")
        if domain:
            rows[domain].append(line)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a folder with train.jsonl and test.jsonl, rows with a domain")
    parser.add_argument("target", type=Path, help="where the folders go; must not exist")
    parser.add_argument("--rows", type=int, default=200, help="training rows per domain")
    args = parser.parse_args()
    train, test = by_domain(args.source / "train.jsonl"), by_domain(args.source / "test.jsonl")
    for domain in sorted(train):
        folder = args.target / domain.replace("_", "-")
        folder.mkdir(parents=True)
        (folder / "train.jsonl").write_text("\n".join(train[domain][: args.rows]) + "\n", "utf-8")
        (folder / "test.jsonl").write_text("\n".join(test[domain]) + "\n", "utf-8")
        print(f"{folder}: {len(train[domain][: args.rows])} training rows, {len(test[domain])} test rows")


if __name__ == "__main__":
    main()
