"Figure 3 as a page: the figures it shows, and what a hostile text may not do to it."
import base64
import hashlib
import re

import pytest
from hypothesis import given, settings, strategies as st
from lxml import html as lxml_html

from phi4_ref.eval.page import GROUNDS, SCRIPT, curve_svg, figure3_page, places, shade, told, visible
from phi4_ref.eval.stats import wilson

COUNTS, LOGPROBS = [(20, 10), (40, 36), (60, 54), (50, 5), (1, 0)], [-.7, -3., -.1, -.2]


def test_the_figures_of_each_token():
    at = places(COUNTS, LOGPROBS, .2)
    assert [a["p"] for a in at] == [.5, .9, .9, .1, 0]
    assert [a["pivotal"] for a in at[1:]] == [True, False, True, False] and [a["unlikely"] for a in at[1:]] == [False, True, False, False]
    w = wilson(36, 40)
    assert (at[1]["low"], at[1]["high"]) == (w.low, w.high) and (at[-1]["low"], at[-1]["high"]) == (0, 0)  # the end is known
    text = told(at[3], at[2], 2, " so")
    assert "token 2 ' so'" in text and "(54/60" in text and "(5/50" in text and "-0.80, pivotal" in text
    assert "wrong, the end" in told(at[4], at[3], 3, ".") and "-0.00" not in told(at[2] | dict(change=-.001), at[1], 1, "x")


def test_a_change_of_exactly_the_gap_is_pivotal():
    assert places([(10, 3), (10, 5)], [0.], .2)[1]["pivotal"] and not places([(10, 3), (100, 49)], [0.], .2)[1]["pivotal"]


@pytest.mark.parametrize("counts, says", [([(20, 10)], "1 counts for 4 tokens"), ([(20, 10), (0, 0), *COUNTS[2:]], "place 1"), ([(20, 21), *COUNTS[1:]], "place 0")])
def test_counts_that_cannot_be_are_named(counts, says):
    with pytest.raises(ValueError, match=says): places(counts, LOGPROBS, .2)
    with pytest.raises(ValueError, match="3 tokens with 4"): figure3_page(["a"] * 3, COUNTS, LOGPROBS)


def test_boxes_lines_colours_and_curve():
    page = lxml_html.fromstring(figure3_page(["a", " b", " c\n", "."], COUNTS, LOGPROBS))
    tokens = page.xpath("//span[@data-i]")
    assert [t.get("class") for t in tokens] == ["t g10 pivot".replace("g10", "g18"), "t g18 unlikely", "t g2 pivot", "t g0"]
    assert [t.xpath("b/text()") for t in tokens] == [["+0.40"], [], ["-0.80"], []]
    assert len(page.xpath("//svg//rect")) == 2 and len(page.xpath("//table/tr")) == 3
    x, y = zip(*(map(float, p.split(",")) for p in page.xpath("//polyline/@points")[0].split()))
    assert len(x) == 5 and list(x) == sorted(x) and y[1] == y[2] < y[0] < y[3] < y[4]
    assert "pivotal token" not in figure3_page(["a", "b"], [(9, 3)] * 3, [-.1, -.1])  # no pivots, no table


def test_ends_and_middle_of_the_colours():
    for mode, (low, middle, high) in GROUNDS.items(): assert (shade(0, mode), shade(.5, mode), shade(1, mode)) == (low, middle, high)


def check_page(page):
    document = lxml_html.fromstring(page)
    assert [e.tag for e in document.xpath("//div[@class='text']//*") if e.tag not in ("span", "b", "i")] == []
    assert len(document.xpath("//script")) == 1 and document.xpath("//script/text()") == [SCRIPT]
    assert not document.xpath("//@src | //@href | //@onclick | //@onerror | //@style") and not re.search(r"url\(|@import", page)
    assert [a for e in document.xpath("//span[@data-i]") for a in e.attrib if a not in ("class", "data-i", "title")] == []
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\u200b-\u200f\u202a-\u202e\u2060-\u206f]", page)


HOSTILE = ["</script><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onclick='alert(1)", "</span></div><h1>", "<!--", "]]>", "&lt;b&gt;", "\u202egnp.exe", "\x00\x1b[31m", "{color:red}</style>", "${alert(1)}", "\ud83d"]


@pytest.mark.parametrize("token", HOSTILE)
def test_a_hostile_text_stays_text(token, tmp_path):
    page = figure3_page([token, "b", token + "\n", "."], COUNTS, LOGPROBS, prompt=token, title=token, path=tmp_path/"page.html")
    check_page(page)
    if token.isprintable(): assert lxml_html.fromstring(page).xpath("//span[@data-i='0']")[0].text_content() == token + "+0.40"
    assert (tmp_path/"page.html").read_text(encoding="utf-8") == page


@given(st.text(st.characters(codec=None), max_size=30))
@settings(max_examples=300, deadline=None)
def test_any_text_stays_text(token):
    shown = visible(token)
    root = lxml_html.fromstring(f"<p>{shown}</p>")
    assert {e.tag for e in root.iter()} <= {"p", "i"} and all(not e.attrib for e in root.iter())
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
    shown.encode()


def test_the_page_allows_itself_nothing_but_its_own_script():
    page = figure3_page(["a"], [(4, 2), (4, 2)], [-1.])
    policy = lxml_html.fromstring(page).xpath("//meta[@http-equiv='Content-Security-Policy']/@content")[0]
    written = re.search("<script>(.*)</script>", page, re.S)[1]
    assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(written.encode()).digest()).decode()}'" in policy and "default-src 'none'" in policy


def test_a_curve_of_one_token_and_of_thousands():
    for n in (1, 5000): assert curve_svg(places([(4, 2)] * (n + 1), [-.1] * n, .2)).count(",") >= 3 * (n + 1)
