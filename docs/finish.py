"""The last touch on built pages, and what a page must be: images with words and a size, headings in order."""

import re
import struct
from html import unescape
from os.path import dirname, join, normpath
from pathlib import Path
from urllib.parse import unquote, urlsplit

IMG = re.compile(r"<img\b[^>]*>")
HIDDEN = re.compile(r"<!--.*?-->|(<script\b[^>]*>).*?</script>", re.S | re.I)  # only the tag of a script is looked at
MAIN, MAIN_END = re.compile(r"<main\b", re.I), re.compile(r"</main>", re.I)
TAG = re.compile(r"""<([a-zA-Z][\w-]*)((?:\s+[^\s=>"'/]+(?:\s*=\s*(?:"[^"]*"|'[^']*'))?)+)?\s*/?>""")
ATTRIBUTE = re.compile(r"""([^\s=>"'/]+)\s*=\s*(?:"([^"]*)"|'([^']*)')""")
RAW = re.compile(r"(?<=<p>)\|[^<\n]*\|(?=\n|</p>)|(?<=<p>)#{1,6} [^<\n]*")  # a table or a heading left as it was typed
HEAD = re.compile(r"(?<=<th>)[^<]*_[^<]*(?=</th>)")
BESIDE = re.compile(r"(\(?<math>(?:(?!</math>).)*</math>[,.;:!?)’”]+|\(<math>(?:(?!</math>).)*</math>)", re.S)
PIXELS = re.compile(rb'<svg\b[^>]*?\bwidth="([\d.]+)(pt|px)?"[^>]*?\bheight="([\d.]+)(pt|px)?"', re.S)


def size_of(path):
    "Width and height of a PNG or SVG in CSS pixels, or None."
    head = path.read_bytes()[:4000] if path.is_file() else b""
    if head[:8] == b"\x89PNG\r\n\x1a\n": return struct.unpack(">II", head[16:24])
    found = PIXELS.search(head)
    if not found: return None
    scale = 4 / 3 if found[2] == b"pt" else 1
    return round(float(found[1]) * scale), round(float(found[3]) * scale)


def sized(text, folder):
    "A page's text with width and height on every image of the site, so that nothing moves while it loads."
    def fill(match):
        tag = match[0]
        src = re.search(r'\bsrc="([^"]+)"', tag)
        if not src or re.search(r"\bwidth=", tag): return tag
        size = size_of(folder / unquote(src[1]))
        return tag.replace("<img", f'<img width="{size[0]}" height="{size[1]}" loading="lazy"', 1) if size else tag
    return IMG.sub(fill, text)


def ids(text): return set(re.findall(r'\bid="([^"]+)"', text))


def anchored(text, folder):
    "A page's text in which a link marked `data-section` keeps its anchor only where the goal has it."
    held = {}

    def check(match):
        place, anchor = match[1], match[2]
        if place not in held: held[place] = ids((folder / place).read_text(encoding="utf-8"))
        return f'href="{place}{f"#{anchor}" if anchor in held[place] else ""}"'
    return re.sub(r'data-section href="([^"#]+)#([^"]*)"', check, text)


def widened(text):
    "A page's text with a class for pages without a list of sections, whose place is kept free elsewhere."
    return text if "bd-sidebar-secondary" in text else text.replace('class="bd-content"', 'class="bd-content wide"', 1)


def wrapping(text):
    "A page's text in which the heads of columns may break after an underscore."
    return HEAD.sub(lambda match: match[0].replace("_", "_<wbr>"), text)


def kept_together(text):
    "A page's text in which no line ends between a formula and the punctuation that belongs to it."
    return BESIDE.sub(r'<span class="together">\1</span>', text)


def finish(folder):
    "Sizes on images, anchors of links, columns of the page and heads of tables, in every page of a built site."
    for path in Path(folder).rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        done = kept_together(wrapping(widened(anchored(sized(text, path.parent), path.parent))))
        if done != text: path.write_text(done, encoding="utf-8")


class Page:
    "What a page holds: anchors, where it points, images, headings of its main part, what it loads."

    def __init__(self, text):
        self.anchors, self.points, self.images, self.headings, self.loads = set(), [], [], [], []
        self.raw = [found[0] for found in RAW.finditer(text)]
        text = HIDDEN.sub(lambda match: match[1] or "", text)
        start, end = (found.start() if found else None for found in (MAIN.search(text), MAIN_END.search(text)))
        for match in TAG.finditer(text):
            inside = start is not None and start <= match.start() < (end or len(text))
            attrs = {name.lower(): unescape(a or b) for name, a, b in ATTRIBUTE.findall(match[2] or "")}
            self.read(match[1].lower(), attrs, inside)

    def read(self, tag, attrs, inside):
        "Take note of one tag."
        if attrs.get("id"): self.anchors.add(attrs["id"])
        if tag == "a" and attrs.get("name"): self.anchors.add(attrs["name"])
        self.points += [attrs[name] for name in ("href", "src") if attrs.get(name)]
        if tag == "img": self.images.append(attrs)
        if inside and re.fullmatch(r"h[1-6]", tag): self.headings.append(int(tag[1]))
        if tag in ("script", "img", "iframe", "source") and attrs.get("src"): self.loads.append(attrs["src"])
        if tag == "link" and {"stylesheet", "preload", "icon"} & set(attrs.get("rel", "").split()):
            self.loads.append(attrs.get("href", ""))


def broken(path, page, pages, there, folder):
    """Links of a page that lead to no file or to no anchor, or that need the site to be at the root of a server.

    `pages` and `there` hold paths as strings: the pages that were read, and every file and folder of the site."""
    for point in page.points:
        parts = urlsplit(point)
        if parts.scheme == "file" or (point.startswith("/") and not parts.netloc): yield f"not a relative link {point}"
        if parts.scheme or parts.netloc or point.startswith("/"): continue
        goal = normpath(join(dirname(path), unquote(parts.path))) if parts.path else path
        if goal + "/" in there: goal += "/index.html"
        anchor = unquote(parts.fragment)
        lost = anchor and goal in pages and anchor not in pages[goal].anchors and "search.html" not in point
        if not goal.startswith(folder): yield f"a link out of the site {point}"
        elif goal not in there or lost: yield f"broken link {point}"


def image_faults(page):
    "Images without words or without a size."
    for image in page.images:
        alt, src = (image.get("alt") or "").strip(), image.get("src", "")
        if not alt or re.fullmatch(r"\S+\.(png|svg|jpe?g|gif)", alt): yield f"no alt text on {src}"
        if not (image.get("width") and image.get("height")): yield f"no width and height on {src}"


def heading_faults(page):
    "A page has one h1, first, and goes down one level at a time."
    if page.headings.count(1) != 1 or page.headings[0] != 1: yield f"not one h1, first: {page.headings}"
    for above, below in zip(page.headings, page.headings[1:], strict=False):
        if below > above + 1: yield f"h{below} follows h{above}"


def load_faults(page):
    "Scripts, styles and pictures from elsewhere: the site must work without a network."
    away = [url for url in page.loads if urlsplit(url).netloc or urlsplit(url).scheme not in ("", "data")]
    yield from (f"loads {url}" for url in away)


def raw_faults(page):
    "Markdown that came out as it was typed."
    yield from (f"markdown left as typed: {text[:40]}" for text in page.raw)


def faults(folder):
    "Every (page, what is wrong) of a built site."
    folder = Path(folder).resolve()
    files = sorted(folder.rglob("*"))
    there = {f"{path}/" if path.is_dir() else str(path) for path in [folder, *files]}
    pages = {str(path): Page(path.read_text(encoding="utf-8")) for path in files
             if path.suffix == ".html" and "_static" not in path.relative_to(folder).parts}
    return [(Path(path).relative_to(folder).as_posix(), wrong) for path, page in pages.items()
            for wrong in [*broken(path, page, pages, there, str(folder)), *image_faults(page), *heading_faults(page),
                          *load_faults(page), *raw_faults(page)]]
