"""results/expected.csv: what the main job should give, from its trainings with several seeds.

One more training lies within its row's tolerance 19 times in 20 (Student's interval for a further value).
The records of these trainings are kept in results/expected, where no command looks for runs of its own.
"""

import math
import shutil

import pandas as pd

from s5vh_nb.basics.config import TrainConfig
from s5vh_nb.basics.files import atomic_write
from s5vh_nb.evidence.archive import Archive, pack
from s5vh_nb.evidence.statistics import interval
from s5vh_nb.evidence.study import open_study

ARTEFACT, PROFILE = "s5vh/retrieval", "quick"
SEEDS = (1, 2, 3)


def line_of(dataset, bits, row, records):
    "The expected score of a row."
    score = interval([record.metrics["GmAP"] for record in records])
    tolerance = (score.high - score.low) / 2 * math.sqrt(len(records) + 1)
    place = {"artefact": ARTEFACT, "profile": PROFILE, "dataset": dataset, "bits": bits, "row": row}
    config = records[0].configuration
    trained = {"epochs": config.epochs if isinstance(config, TrainConfig) else None, "seeds": len(records)}
    return {**place, **trained, "GmAP": score.mean, "tolerance": tolerance}


def keep(found, archive):
    "Pack the records into results/expected, in place of earlier ones."
    kept = Archive(archive.root / "results" / "expected", PROFILE)
    shutil.rmtree(kept.root, ignore_errors=True)
    for record in (record for records in found.values() for record in records):
        kept.save(record, archive.arrays(record))
    pack(kept.root, PROFILE)
    shutil.rmtree(kept.runs)


if __name__ == "__main__":
    study = open_study(ARTEFACT, PROFILE, seeds=SEEDS, device="cpu")
    found = study.records()
    keep(found, study.store.archive)
    lines = [line_of(*place, records) for place, records in found.items()]
    frame = pd.DataFrame(lines).astype({"epochs": "Int64"})
    with atomic_write(study.store.root / "results" / "expected.csv") as tmp:
        frame.to_csv(tmp, index=False, float_format="%.4f", encoding="utf-8")
