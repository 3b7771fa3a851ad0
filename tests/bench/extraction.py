"""HTML to text: ours against trafilatura, on the toy web (its clean text is known) and on carriers of fragile content.

    python tests/bench/extraction.py [--quick]     needs trafilatura (pip install trafilatura)

The toy pages are our own and so a home game for quality; the carriers are those of tests/test_extract.py. trafilatura is asked for Markdown, with
comments and tables, favouring recall.
"""
import argparse
import platform
import re
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import lxml.etree

from phi4_ref.data.extract import extract_html
from phi4_ref.world import World

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_extract import CODE_CARRIERS, TEX_CARRIERS

def f1(found, wanted):
    "F1 of the two texts' words, with their counts."
    found, wanted = (Counter(re.findall(r"\w+", text)) for text in (found, wanted))
    both = sum((found & wanted).values())
    return 2 * both / (found.total() + wanted.total()) if both else 0.0

def fragile(extract):
    "How many carriers of code and of equations come out whole."
    filler = "<p>" + "Some plain words around the carrier that make up a paragraph of prose. " * 5 + "</p>"
    page = lambda inside: f"<html><body><article><h1>T</h1>{filler}{inside}{filler}</article></body></html>"
    code = sum("def f():\n    pass" in extract(page(soup)) for soup in CODE_CARRIERS.values())
    tex = sum(bool(re.search(r"a\^\{?2", extract(page(f"<p>The square {carrier} grows with the side.</p>")))) for carrier in TEX_CARRIERS)
    return code, tex

def seconds(extract, pages):
    start = time.process_time()
    texts = [extract(page["html"]) for page in pages]
    return time.process_time() - start, texts

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="300 pages instead of 2,000")
    quick = parser.parse_args().quick
    try: import trafilatura
    except ImportError: sys.exit("this benchmark compares with trafilatura: pip install trafilatura")
    peer = lambda html: trafilatura.extract(html, output_format="markdown", include_comments=True, include_tables=True, favor_recall=True) or ""
    pages = [page for page in World(seed=0, pages=300 if quick else 2000).pages() if page["meta"]["defect"] is None]
    size, speeds, table = sum(len(page["html"]) for page in pages) / 1e6, {"ours": [], "trafilatura": []}, {}
    for _ in range(3):
        for name, extract in (("ours", extract_html), ("trafilatura", peer)):
            taken, texts = seconds(extract, pages)
            speeds[name].append(size / taken)
            scores = {}
            for page, text in zip(pages, texts): scores.setdefault(page["meta"]["kind"], []).append(f1(text, page["meta"]["text"]))
            table[name] = {kind: statistics.mean(values) for kind, values in sorted(scores.items())}
    kinds = list(table["ours"])
    print(f"{'':12} {'MB/s':>6} " + " ".join(f"{kind:>10}" for kind in kinds) + f" {'code':>7} {'TeX':>7}")
    for name, extract in (("ours", extract_html), ("trafilatura", peer)):
        code, tex = fragile(extract)
        print(f"{name:12} {statistics.median(speeds[name]):6.1f} " + " ".join(f"{table[name][kind]:10.3f}" for kind in kinds) + f" {code:4}/{len(CODE_CARRIERS)} {tex:4}/{len(TEX_CARRIERS)}")
    print(f"word F1 by kind of page; {len(pages)} pages, {size:.1f} MB; Python {platform.python_version()}, lxml {lxml.etree.__version__}, trafilatura {trafilatura.__version__}, {platform.machine()}")
    ratios = sorted(ours / theirs for ours, theirs in zip(speeds["ours"], speeds["trafilatura"]))
    print(f"ratio: {ratios[1]:.2f} ({ratios[0]:.2f}-{ratios[2]:.2f})")

if __name__ == "__main__": main()
