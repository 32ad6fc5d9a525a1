# Which chapter needs which, and the book at the end.
#
#   snakemake --cores all --config profile=smoke seeds="0 1"     (`make book` says this for you)
#   snakemake -n                                                 what would run

import sys

from lab_utils import batch

SETTINGS = batch.read_settings(config)  # a misspelled name stops here, before anything runs
PYTHON = sys.executable

# A chapter is run again when a chapter it builds on was.
NEEDS = {
    "01_the_question_and_the_data": [],
    "02_preprocessing": ["01_the_question_and_the_data"],
    "03_a_vae_from_scratch": ["02_preprocessing"],
    "04_training_vae_h": ["02_preprocessing"],
    "05_training_vae": ["02_preprocessing"],
    "06_the_baselines": ["02_preprocessing"],
    "07_scoring_in_latent_space": ["04_training_vae_h", "05_training_vae", "06_the_baselines"],
    "08_evaluation": ["07_scoring_in_latent_space"],
    "09_what_vae_h_saw": ["08_evaluation"],
}
# These work on subjects side by side, a process per core. The others compute in threads: two chapters
# with half of the cores each get further than one with all, because threads wait for each other.
ALL_CORES = {"01_the_question_and_the_data", "02_preprocessing"}

RUNS = [f"{SETTINGS.folder}/seed-{seed}" for seed in SETTINGS.seeds]


wildcard_constraints:
    chapter="|".join(NEEDS),
    seed=r"\d+",


rule all:
    input:
        [f"{run}/book/index.html" for run in RUNS],


rule all_chapters:
    input:
        [f"{run}/executed/{chapter}.ipynb" for run in RUNS for chapter in NEEDS],


rule chapter:
    input:
        script="notebooks/{chapter}.py",
        before=lambda w: [f"{w.run}/seed-{w.seed}/executed/{c}.ipynb" for c in NEEDS[w.chapter]],
        library=batch.library_files(),
    output:
        "{run}/seed-{seed}/executed/{chapter}.ipynb",
    threads: lambda w: workflow.cores if w.chapter in ALL_CORES else max(1, workflow.cores // 2)
    params:
        arguments=SETTINGS.arguments,
    message:
        "Chapter {wildcards.chapter} (seed {wildcards.seed})"
    shell:
        "{PYTHON:q} -m lab_utils.batch {input.script:q} {output:q} {params.arguments}"
        " --seed {wildcards.seed} --workspace {wildcards.run:q}/seed-{wildcards.seed}"
        " --threads {threads}"


rule book:
    input:
        lambda w: [f"{w.run}/seed-{w.seed}/executed/{chapter}.ipynb" for chapter in NEEDS],
        batch.files_below("book"),
        "pyproject.toml",
    output:
        "{run}/seed-{seed}/book/index.html",
    message:
        "The book (seed {wildcards.seed})"
    shell:
        "{PYTHON:q} book/build.py {wildcards.run:q}/seed-{wildcards.seed}"
