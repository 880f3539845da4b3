"""figures/drawings/*.svg: the networks and the data flow, drawn by code in one style.

The pictures are plain SVG with text as text. They are narrow, so that they can be read on a phone.
"""

import re
from html import escape
from pathlib import Path

from s5vh_nb.basics.files import write_text

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "figures" / "drawings"
WIDTH, LINE = 560, 20  # of a picture, and from one line of text to the next
INK = "#222222"

STYLES = {  # of boxes; a loss is also round
    "data": 'fill="#ffffff" stroke="#444444"',
    "step": 'fill="#d6e8f7" stroke="#0072b2"',
    "training": 'fill="#fdecc8" stroke="#a85400"',
    "loss": 'fill="#333333" stroke="#333333"',
}

DASHES = {"training": "6 4"}  # of boxes and arrows

HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img"
 font-family="sans-serif" font-size="15" fill="{ink}">
<title>{title}</title>
<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">
<path d="M0,0 L8,4 L0,8 z"/></marker></defs>
<rect width="{w}" height="{h}" fill="#ffffff"/>
"""


def rich(text):
    "SVG text in which `L_{TR}` has a subscript."
    lowered = r'<tspan dy="4" font-size="11">\1</tspan><tspan dy="-4">&#8203;</tspan>'
    return re.sub(r"_\{(\w+)\}", lowered, escape(text))


class Drawing:
    "Boxes, arrows and labels on white."

    def __init__(self, title, height):
        self.parts = [HEAD.format(w=WIDTH, h=height, title=escape(title), ink=INK)]

    def rect(self, x, y, w, h, style):
        dashes, bend = DASHES.get(style, "none"), h / 2 if style == "loss" else 4
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="{bend:g}" {STYLES[style]} '
            f'stroke-width="1.5" stroke-dasharray="{dashes}"/>\n'
        )

    def box(self, x, y, w, text, style="step"):
        "A box as high as its lines of text, the first one bold."
        lines, ink = text.split("\n"), "#ffffff" if style == "loss" else INK
        self.rect(x, y, w, LINE * len(lines) + 16, style)
        for n, words in enumerate(lines):
            weight = "bold" if n == 0 else "normal"
            self.parts.append(
                f'<text x="{x + w / 2:g}" y="{y + 23 + LINE * n}" text-anchor="middle" '
                f'font-weight="{weight}" fill="{ink}">{rich(words)}</text>\n'
            )

    def arrow(self, *points, style="step"):
        "Along corners (x, y); dashed where it is for training only."
        dashes = DASHES.get(style, "none")
        path = " ".join(f"{x},{y}" for x, y in points)
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{INK}" stroke-width="1.5" '
            f'stroke-dasharray="{dashes}" marker-end="url(#tip)"/>\n'
        )

    def label(self, x, y, text):
        "Lines of text from x, the first one on y."
        for n, words in enumerate(text.split("\n")):
            self.parts.append(f'<text x="{x}" y="{y + 18 * n}" font-size="14">{rich(words)}</text>\n')

    def legend(self, x, y, **styles):
        "What the kinds of boxes mean, one below the other."
        for n, (style, text) in enumerate(styles.items()):
            self.rect(x, y + 26 * n, 34, 18, style)
            self.label(x + 44, y + 14 + 26 * n, text)

    def svg(self):
        return "".join(self.parts) + "</svg>\n"


def s5vh():
    d = Drawing("S5VH: encoder and hash layer, what trains them, and the path of a search", 986)
    d.box(20, 16, 250, "frames x (b, t, d)", "data")
    d.box(150, 96, 120, "two views:\nvisible frames", "training")
    d.arrow((210, 52), (210, 94), style="training")
    d.arrow((60, 52), (60, 198))
    d.label(68, 122, "search:\nall frames")
    d.arrow((210, 152), (210, 198), style="training")
    d.label(218, 180, "(2b, v, d)")
    d.box(
        20,
        200,
        250,
        "encoder\nLinear + positions\n6 bidirectional Mamba layers,\nweights per direction or shared\n"
        "(stochastic depth in training)\nLayerNorm, Linear",
    )
    d.arrow((145, 336), (145, 378))
    d.label(153, 362, "(2b, v, m)")
    d.box(20, 380, 250, "hash layer\nLinear, LayerNorm, sign\n(straight-through gradient)")
    d.arrow((145, 456), (145, 498))
    d.label(153, 482, "codes (2b, v, k)")
    d.box(60, 500, 210, "h: mean over frames")
    d.arrow((165, 536), (165, 592))
    d.label(173, 568, "search: (b, k)")
    d.box(60, 594, 210, "code: sign of h\npacked, (b, k/8) bytes", "data")

    d.arrow((270, 34), (430, 34), (430, 98), style="training")
    d.label(290, 26, "hidden frames (2b, t\u2212v, d)")
    d.box(325, 100, 210, "reconstruction L_{TR}", "loss")
    d.arrow((430, 200), (430, 138), style="training")
    d.label(438, 176, "(2b, t\u2212v, d)")
    d.box(
        312,
        200,
        236,
        "decoder\nLinear + positions, beside\nmask tokens + positions\n1 bidirectional Mamba layer\n"
        "LayerNorm, Linear",
        "training",
    )
    d.arrow((270, 418), (430, 418), (430, 318), style="training")
    d.label(438, 372, "(2b, v, k)")
    d.box(325, 500, 210, "contrast of views L_{CL}", "loss")
    d.arrow((270, 511), (323, 511), style="training")
    d.arrow((270, 525), (298, 525), (298, 622), (323, 622), style="training")
    d.label(306, 574, "h of both views (2b, k)")
    d.box(325, 604, 210, "alignment L_{CA}", "loss")

    labels = "soft labels y (b, c)\nfirst the cluster; then moved\ntowards softmax(h\u00b7C / (k/2))"
    d.box(20, 712, 250, labels, "training")
    d.arrow((60, 518), (36, 518), (36, 710), style="training")
    d.label(44, 676, "after warm-up,\nh of all frames")
    d.arrow((210, 712), (210, 684), (370, 684), (370, 642), style="training")
    d.box(
        312, 712, 236, "hash centers C (c, k)\nHadamard start, ADMM,\nbalanced bits; then fixed", "training"
    )
    d.arrow((470, 712), (470, 642), style="training")
    d.arrow((312, 750), (272, 750), style="training")
    d.arrow((430, 838), (430, 790), style="training")
    d.label(438, 820, "W (c, p)")
    clusters = "clusters, before training\ntime means of all training\nvideos, PCA, k-means"
    d.box(312, 838, 236, clusters, "training")
    d.arrow((312, 876), (145, 876), (145, 790), style="training")
    d.label(153, 838, "first labels, one-hot")
    d.legend(20, 896, step="training and search", training="training only", loss="term of the loss")
    d.label(312, 940, "search: b, t in place of 2b, v")
    d.label(312, 968, "L = L_{TR} + \u03b1 L_{CL} + \u03b2 L_{CA}")
    return d


def dmmh():
    d = Drawing("DMMH: a branch for images and one for texts, their sum, a code, and the losses", 1070)
    for x, features in ((20, "image features (b, di)"), (290, "text features (b, dt)")):
        middle = x + 125
        d.box(x, 16, 250, features, "data")
        d.arrow((middle, 52), (middle, 90))
        d.box(x, 92, 250, "MLP\nLinear, BatchNorm, Tanh, twice")
        d.arrow((middle, 148), (middle, 190))
        d.label(middle + 8, 174, "(b, m)")
        d.box(x, 192, 250, "dilation\na token for each bit,\nby weights of its own\n+ positions, dropout")
        d.arrow((middle, 288), (middle, 330))
        d.label(middle + 8, 314, "(b, k, m)")
        d.box(x, 332, 250, "2 Mamba layers\nforward along the tokens")
    d.arrow((145, 388), (145, 430))
    d.label(153, 414, "(b, k, m)")
    d.arrow((415, 388), (415, 450), (272, 450))
    d.label(423, 414, "(b, k, m)")
    d.box(20, 432, 250, "sum")
    d.arrow((145, 468), (145, 510))
    d.label(153, 494, "(b, k, m)")
    d.box(20, 512, 250, "CNN\na 1\u00d71 convolution for each bit,\nBatchNorm, Tanh")
    d.arrow((145, 588), (145, 630))
    d.label(153, 614, "(b, k, 64)")
    d.box(20, 632, 250, "hash layer\na 1\u00d71 convolution for each bit,\nTanh")
    d.arrow((145, 708), (145, 750))
    d.box(20, 752, 250, "relaxed code h (b, k)")
    d.arrow((145, 788), (145, 830))
    d.box(20, 832, 250, "code: sign of h\npacked, (b, k/8) bytes", "data")

    d.box(325, 530, 210, "similarity", "loss")
    d.box(320, 604, 220, "labels Y (b, n)", "data")
    d.box(325, 678, 210, "classification", "loss")
    d.box(320, 752, 220, "classifier\nLinear", "training")
    d.box(325, 842, 210, "quantization", "loss")
    d.arrow((430, 604), (430, 568), style="training")
    d.arrow((430, 640), (430, 676), style="training")
    d.arrow((430, 752), (430, 716), style="training")
    d.label(438, 740, "(b, n)")
    d.arrow((270, 770), (318, 770), style="training")
    d.arrow((296, 770), (296, 548), (323, 548), style="training")
    d.arrow((296, 770), (296, 860), (323, 860), style="training")
    d.label(20, 914, "L = \u03bb_{s} similarity + \u03bb_{c} classification + \u03bb_{q} quantization")
    d.label(20, 938, "\u03bb_{s} = \u03bb_{c} = 1, and \u03bb_{q} = 0 unless asked for")
    d.label(20, 962, "The paper gives no sizes and no loss: they are inferred.")
    d.legend(20, 984, step="training and search", training="training only", loss="term of the loss")
    return d


def plus():
    d = Drawing("Plus: selective layers beside a linear hash of all frames", 640)
    d.box(155, 16, 250, "frames x (b, t, d)", "data")
    d.arrow((280, 52), (280, 90))
    d.box(155, 92, 250, "resample\nto s equally spaced times")
    for x in (145, 415):
        d.arrow((280, 148), (280, 184), (x, 184), (x, 218))
    d.label(288, 170, "(b, s, d)")
    layers = "Linear + positions\n2 bidirectional Mamba layers\nLayerNorm"
    layers += "\ntimes side by side\ndropout, Linear, \u00d7 gain"
    d.box(20, 220, 250, f"layers\n{layers}")
    d.box(290, 220, 250, "linear hash\nITQ's projection of all frames,\nfitted once, before training")
    d.arrow((145, 356), (145, 416), (203, 416))
    d.label(153, 382, "(b, k)")
    d.arrow((415, 296), (415, 416), (357, 416))
    d.label(423, 362, "(b, k)")
    d.box(205, 398, 150, "sum")
    d.arrow((280, 434), (280, 472))
    d.box(155, 474, 250, "BatchNorm")
    d.arrow((280, 510), (280, 568))
    d.label(288, 544, "h (b, k)")
    d.box(155, 570, 250, "code: sign of h\npacked, (b, k/8) bytes", "data")
    return d


def data_flow():
    d = Drawing("From data sets to tables and claims, and from a folder of videos to a search", 990)
    d.box(20, 42, 240, "data set\nbundled, or the papers' files", "data")
    d.box(300, 16, 240, "folder of videos", "data")
    d.arrow((420, 52), (420, 80))
    d.box(300, 82, 240, "features of frames\nby an image network")
    d.arrow((140, 98), (140, 174))
    d.arrow((420, 138), (420, 174))
    d.label(428, 160, "(n, t, d)")
    d.box(20, 176, 520, "Dataset\ntraining items, database, queries", "data")
    d.arrow((420, 232), (420, 270))
    d.box(60, 272, 200, "configuration\ndeclared in experiments\nor on the command line", "data")
    d.arrow((260, 310), (298, 310))
    d.box(300, 272, 240, "training\na network and its objective;\nbaselines are fitted")
    d.arrow((420, 348), (420, 400))
    d.label(428, 380, "hash function")
    d.arrow((36, 232), (36, 400))
    d.box(20, 402, 520, "packed codes (n, k/8)\nof database and queries", "data")

    d.arrow((140, 458), (140, 510))
    d.box(20, 512, 240, "scores\nmAP, GmAP, precision-recall")
    d.arrow((140, 568), (140, 606))
    d.box(20, 608, 240, "run record\none line of text per run;\na run is made once", "data")
    d.arrow((160, 684), (160, 722))
    d.arrow((36, 684), (36, 818))
    d.box(60, 724, 200, "judge\ndifferences, intervals")
    d.arrow((160, 780), (160, 818))
    d.box(20, 820, 240, "tables, figures, claims", "data")
    d.arrow((140, 856), (140, 894))
    d.box(20, 896, 240, "notebooks and README\nwith sentences that are\nmade from records", "data")

    d.arrow((350, 458), (350, 510))
    d.box(300, 512, 112, "index\ncodes, ids", "data")
    d.box(428, 512, 112, "new video\nand its code", "data")
    d.arrow((350, 568), (350, 606))
    d.arrow((484, 568), (484, 606))
    d.box(300, 608, 240, "Hamming search\nthe nearest codes")
    d.arrow((420, 664), (420, 722))
    d.box(300, 724, 240, "neighbours\non the command line, on a\npage, or as JSON", "data")
    d.legend(300, 896, step="a step", data="what is kept, or given")
    return d


DRAWINGS = {"s5vh": s5vh, "dmmh": dmmh, "plus": plus, "data_flow": data_flow}

if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        write_text(FOLDER / f"{name}.svg", draw().svg())
