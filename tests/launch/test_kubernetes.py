"""launch/kubernetes.yaml against the parts of the published API that it uses (JobSet v1alpha2 and, within it, batch/v1
and core/v1), and against what its hosts would start. No cluster is asked.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
Tree = dict[str, Any]

# A key is required where it ends in "!"; a value is a type, the set of its values, an object, or a list of such.
CONTAINER: Tree = {
    "name!": str,
    "image": str,
    "workingDir": str,
    "command": [str],
    "args": [str],
    "env": [{"name!": str, "value": str}],
    "resources": {"limits": {"nvidia.com/gpu": int, "cpu": str, "memory": str}, "requests": dict},
    "volumeMounts": [{"name!": str, "mountPath!": str, "subPath": str, "readOnly": bool}],
}
POD: Tree = {
    "restartPolicy": {"Never", "OnFailure"},  # what a Job allows
    "terminationGracePeriodSeconds": int,
    "nodeSelector": dict,
    "containers!": [CONTAINER],
    "volumes": [
        {
            "name!": str,
            "emptyDir": {"medium": {"", "Memory"}, "sizeLimit": str},
            "persistentVolumeClaim": {"claimName!": str, "readOnly": bool},
        }
    ],
}
JOB: Tree = {
    "parallelism": int,
    "completions": int,
    "completionMode": {"Indexed", "NonIndexed"},
    "backoffLimit": int,
    "template!": {"metadata": dict, "spec!": POD},
}
JOBSET: Tree = {
    "apiVersion!": {"jobset.x-k8s.io/v1alpha2"},
    "kind!": {"JobSet"},
    "metadata!": {"name!": str, "namespace": str, "labels": dict, "annotations": dict},
    "spec!": {
        "network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
        "failurePolicy": {"maxRestarts": int, "restartStrategy": {"Recreate", "BlockingRecreate"}},
        "replicatedJobs": [{"name!": str, "replicas": int, "template!": {"metadata": dict, "spec!": JOB}}],
    },
}


def faults(tree: object, schema: Any, where: str = "") -> Iterator[str]:
    """A line for each thing that the schema does not have or have so."""
    match schema:
        case dict():
            if not isinstance(tree, dict):
                yield f"{where} is no object"
                return
            known = {key.rstrip("!"): value for key, value in schema.items()}
            for key, value in tree.items():
                if key not in known:
                    yield f"{where}.{key} is unknown"
                else:
                    yield from faults(value, known[key], f"{where}.{key}")
            yield from (f"{where}.{key[:-1]} is missing" for key in schema if key[-1] == "!" and key[:-1] not in tree)
        case list():
            if not isinstance(tree, list):
                yield f"{where} is no list"
                return
            for number, value in enumerate(tree):
                yield from faults(value, schema[0], f"{where}[{number}]")
        case set():
            if tree not in schema:
                yield f"{where} is {tree}, not one of {sorted(schema)}"
        case _:
            if type(tree) is not schema:
                yield f"{where} is {tree!r}, no {schema.__name__}"


@pytest.fixture
def jobset() -> Tree:
    tree = yaml.safe_load((ROOT / "launch/kubernetes.yaml").read_text())
    assert isinstance(tree, dict)
    return tree


def test_it_is_a_jobset_of_the_published_api(jobset: Tree) -> None:
    assert list(faults(jobset, JOBSET)) == []


def test_what_the_api_has_not_is_found(jobset: Tree) -> None:
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    job["completionMode"] = "indexed"
    pod["containers"][0]["args"].append(2)
    pod["containers"][0]["volumeMount"] = []
    del pod["volumes"][0]["name"]
    jobset["spec"]["failurePolicy"]["maxRestarts"] = "50"
    within = ".spec.replicatedJobs[0].template.spec"
    assert sorted(faults(jobset, JOBSET)) == [
        ".spec.failurePolicy.maxRestarts is '50', no int",
        f"{within}.completionMode is indexed, not one of ['Indexed', 'NonIndexed']",
        f"{within}.template.spec.containers[0].args[9] is 2, no str",
        f"{within}.template.spec.containers[0].volumeMount is unknown",
        f"{within}.template.spec.volumes[0].name is missing",
    ]


def test_its_numbers_agree_and_its_hosts_would_meet(jobset: Tree) -> None:
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    options = dict(word[2:].split("=") for word in container["args"] if word.startswith("--"))
    settings = dict(word.split("=") for word in container["args"] if "=" in word and not word.startswith("--"))
    assert replicated["replicas"] == 1
    assert job["parallelism"] == job["completions"] == int(options["nnodes"])
    assert job["backoffLimit"] == 0  # one lost pod is the whole set's new start: ranks of one try do not meet another's
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(options["gpus"])
    # pods are known as <set>-<replicated job>-<job>-<pod>.<subdomain>
    first = f"{jobset['metadata']['name']}-{replicated['name']}-0-0.{jobset['spec']['network']['subdomain']}"
    assert options["rdzv-endpoint"].split(":")[0] == first
    grace = float(settings["checkpoint.grace_seconds"])
    assert grace < int(options["shutdown-timeout"]) < pod["terminationGracePeriodSeconds"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}

    done = subprocess.run(
        ["bash", ROOT / container["command"][0], "--print", *container["args"]],
        cwd=ROOT, env={"PATH": "/usr/bin:/bin", "DIFFMOE_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    command = done.stdout.splitlines()[-1]
    assert f"--nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint {first}:29400 " in command
    assert f" -m diffmoe_ep train {ROOT}/configs/imagenet/diffmoe_l_e16_flow.yaml " in command
