"""s5vh_nb/data/plus/*/README.md: cards of the bundled networks, from their scores and from the evidence."""

from s5vh_nb.basics.files import write_text
from s5vh_nb.basics.profiles import train_config
from s5vh_nb.datasets.catalog import load
from s5vh_nb.evidence.judge import scores_of
from s5vh_nb.evidence.statistics import paired_bootstrap
from s5vh_nb.evidence.store import Store
from s5vh_nb.evidence.trained import model_card, score_trained
from s5vh_nb.learning.resolve import resolve
from s5vh_nb.models.plus import WEIGHTS, pretrained

LICENCES = {"animated-emoji": "mit", "spoken-digits": "cc-by-sa-4.0", "spoken-pairs": "cc-by-sa-4.0"}
SEEDS = (1, 2, 3, 4, 5)


def configuration(name: str, seed: int = 1):
    "How the network of a set was trained."
    return train_config(name, "full", "plus", bits=64, seed=seed)


def trained_again(name: str) -> str:
    "What the same configuration has in the full profile, where it was trained with several seeds."
    store = Store("s5vh/retrieval", "full", may_train=False)
    records = store.get_many([configuration(name, seed) for seed in SEEDS])
    scores = scores_of(records, store)
    gmap = "{:.3f} [{:.3f}, {:.3f}]".format(*paired_bootstrap(scores, 0 * scores))
    devices = ", ".join(sorted({record.device for record in records}))
    sentences = (
        "These weights were trained on a CPU and are kept in half precision.",
        f"In the full profile the same configuration was trained with {len(SEEDS)} seeds ({devices}).",
        f"GmAP there: {gmap}, with its 95 % interval over queries and seeds.",
        "Its records are in `results/full/evidence/s5vh_retrieval.jsonl`, the first one has the name below.",
    )
    return "## The same training, repeated\n\n" + "\n".join(sentences)


def card(name: str) -> str:
    "The card of the network that was trained on a set."
    data, network = load(name), pretrained(name)
    record = score_trained(network, resolve(configuration(name), data), data, "cpu")
    whole = network.generate_model_card()
    whole.data.license = LICENCES[name]
    how = "## How it was made"
    whole.text = model_card(record).replace(how, f"{trained_again(name)}\n\n{how}")
    return str(whole)


if __name__ == "__main__":
    for name in LICENCES:
        write_text(WEIGHTS / name / "README.md", card(name))
