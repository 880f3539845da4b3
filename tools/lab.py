"""Settings of JupyterLab for `make lab`: a notebook that nobody has changed counts as unchanged.

Lab writes the name and the version of the kernel into a notebook that it opens, and marks it as changed
where the file has others. Committed notebooks have none, so Lab gets a notebook with those of this machine
and saves it as it is committed: without them, with small pictures, without sliders, and an artefact notebook
without outputs.
"""

from pathlib import Path

from ipykernel.ipkernel import IPythonKernel
from jupyter_client.kernelspec import get_kernel_spec
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
from nbdev.clean import clean_jupyter

from s5vh_nb.cli.artefacts import PAPERS
from s5vh_nb.cli.execute import shrink_pictures
from s5vh_nb.evidence.lessons import stand_still

KERNEL = "python3"


class Contents(AsyncLargeFileManager):
    "The project's files; a notebook is read as Lab would change it, and saved as it is committed."

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_pre_save_hook(clean)

    async def get(self, path, *args, **options):
        "A file's or folder's model; that of a notebook names the kernel as Lab does."
        model = await super().get(path, *args, **options)
        content = model["content"] if model["type"] == "notebook" else None
        if content and content.metadata.get("kernelspec", {}).get("name") == KERNEL:
            spec = get_kernel_spec(KERNEL)
            named = dict(name=KERNEL, display_name=spec.display_name, language=spec.language)
            content.metadata.update(kernelspec=named, language_info=IPythonKernel.language_info)
        return model


def clean(model, path, **_):
    "Before a notebook is saved, make it what is committed."
    clean_jupyter(path, model)
    if model["type"] != "notebook":
        return
    shrink_pictures(model["content"])
    stand_still(model["content"])
    if Path(path).parent.name in PAPERS:
        for cell in model["content"]["cells"]:
            if cell["cell_type"] == "code":
                cell["outputs"] = []


c = get_config()  # noqa: F821 (Jupyter defines it where it reads this file)
c.ServerApp.contents_manager_class = Contents
