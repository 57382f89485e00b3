#!/usr/bin/env python3
"""Renders the manifests of deploy/kubernetes and checks them. No cluster is contacted.

    python3 -m venv v && v/bin/pip install -r deploy/tests/static-requirements.txt
    v/bin/python deploy/tests/kubernetes.py

| what | with |
|---|---|
| rendering | kustomize, or kubectl 1.27 or later |
| Kubernetes' own objects; unknown fields are errors | the JSON schemas of each version in VERSIONS |
| PodMonitor, ScaledObject; unknown fields are errors | types made from their CRDs (npm packages, see schemas/), checked by TypeScript |
| references between objects, timeouts, security settings | rules below |
| queries | a PromQL parser, and the metrics that docs/operations.md lists |
| rerankd.toml | rerankd itself ($RERANKD_BIN, or target/release/rerankd) |

At the end, planted mistakes must be found.
"""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import kubernetes_validate
import promql_parser
import yaml

DEPLOY = Path(__file__).resolve().parent.parent
REPOSITORY = DEPLOY.parent
KUBERNETES = DEPLOY / "kubernetes"
WORK = REPOSITORY / "target" / "tmp" / "schemas"
RERANKD = Path(os.environ.get("RERANKD_BIN") or REPOSITORY / "target" / "release" / "rerankd")
# The oldest one that the manifests support, and newer ones.
VERSIONS = ["1.29", "1.31", "1.33", "1.35", "1.37"]
CUSTOM = {
    "ScaledObject": "@kubernetes-models/keda/keda.sh/v1alpha1/ScaledObject",
    "PodMonitor": "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/PodMonitor",
}
# What is rendered: folders, and components that are added.
RENDERED = {
    "cpu": (["overlays/cpu"], []),
    "gpu": (["overlays/gpu"], []),
    "cpu with keda": (["overlays/cpu"], ["keda", "pod-monitor", "network-policy"]),
    "gpu with hpa": (["overlays/gpu"], ["hpa", "pod-monitor", "network-policy"]),
    "download": (["download"], []),
}


def renderer():
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    if shutil.which("kubectl"):
        return ["kubectl", "kustomize"]
    print("SKIPPED: neither kustomize nor kubectl is installed")
    sys.exit(0)


def render(command, resources, components):
    with tempfile.TemporaryDirectory(dir=KUBERNETES) as folder:
        text = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [f"../{name}" for name in resources],
            "components": [f"../components/{name}" for name in components],
        }
        Path(folder, "kustomization.yaml").write_text(yaml.safe_dump(text))
        done = subprocess.run([*command, folder], capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{resources} {components}: {done.stderr}")
    return list(yaml.safe_load_all(done.stdout))


def name_of(item):
    return f"{item['kind']} {item['metadata']['name']}"


def check_schemas(items):
    """Problems of Kubernetes' own objects."""
    for item in items:
        if item["kind"] in CUSTOM:
            continue
        for version in VERSIONS:
            try:
                kubernetes_validate.validate(item, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                yield f"{name_of(item)}, Kubernetes {version}: {'.'.join(map(str, error.path))}: {error.message}"


def install_types():
    """Installs TypeScript and the types. False without npm."""
    if not shutil.which("npm"):
        print("SKIPPED: PodMonitor and ScaledObject, because npm is not installed")
        return False
    WORK.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copy(DEPLOY / "tests" / "schemas" / name, WORK)
    subprocess.run(["npm", "ci", "--ignore-scripts", "--silent"], cwd=WORK, check=True)
    return True


def check_custom(items):
    """Problems of custom resources."""
    custom = [item for item in items if item["kind"] in CUSTOM]
    if not custom:
        return
    lines = [f'import type {{ I{kind} }} from "{path}";' for kind, path in CUSTOM.items()]
    lines += [f"export const o{i}: I{item['kind']} = {json.dumps(item)};" for i, item in enumerate(custom)]
    Path(WORK, "check.mts").write_text("\n".join(lines) + "\n")
    options = ["--noEmit", "--strict", "--skipLibCheck", "--module", "node16", "--moduleResolution", "node16"]
    done = subprocess.run(["npx", "tsc", *options, "check.mts"], cwd=WORK, capture_output=True, text=True)
    for line, text in re.findall(r"^check\.mts\((\d+),\d+\): error TS\d+: (.*)", done.stdout, re.M):
        item = int(line) - len(CUSTOM) - 1
        yield f"{name_of(custom[item]) if item >= 0 else 'import'}: {text}"
    if done.returncode != 0 and "check.mts" not in done.stdout:
        yield f"tsc: {done.stdout}{done.stderr}"


def one(items, kind):
    found = [item for item in items if item["kind"] == kind]
    return found[0] if found else None


def pod_template(item):
    return item["spec"].get("template") if item["kind"] in ("Deployment", "Job") else None


def check_pods(items):
    for item in items:
        template = pod_template(item)
        if template is None:
            continue
        pod, name = template["spec"], name_of(item)
        if not pod["securityContext"].get("runAsNonRoot"):
            yield f"{name}: may run as root"
        if pod["securityContext"].get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{name}: no seccomp profile"
        if pod.get("automountServiceAccountToken") is not False:
            yield f"{name}: mounts a service account token"
        # A Service `rerankd` becomes RERANKD_PORT=tcp://..., which is the variable of --port.
        if pod.get("enableServiceLinks") is not False:
            yield f"{name}: enableServiceLinks sets RERANKD_PORT"
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            context = container["securityContext"]
            if not context.get("readOnlyRootFilesystem") or context.get("allowPrivilegeEscalation") is not False:
                yield f"{name}: the root is writable, or privileges can grow"
            if context.get("capabilities") != {"drop": ["ALL"]}:
                yield f"{name}: has capabilities"
            if not {"cpu", "memory"} <= container["resources"]["requests"].keys() or "memory" not in container["resources"]["limits"]:
                yield f"{name}: no CPU or memory request, or no memory limit"
            if {mount["name"] for mount in container["volumeMounts"]} != volumes:
                yield f"{name}: volumes and mounts differ"


def check_servers(items):
    """References between the objects of a server, and its timeouts."""
    deployment = one(items, "Deployment")
    if deployment is None:
        return
    spec, pod = deployment["spec"], deployment["spec"]["template"]["spec"]
    labels, container = spec["template"]["metadata"]["labels"], pod["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}

    selectors = {"Deployment": spec["selector"]["matchLabels"], "Service": one(items, "Service")["spec"]["selector"]}
    selectors["spread"] = pod["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"]
    for kind, field in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector"), ("PodMonitor", "selector")):
        if one(items, kind):
            selectors[kind] = one(items, kind)["spec"][field]["matchLabels"]
    for kind, selector in selectors.items():
        if not selector or not selector.items() <= labels.items():
            yield f"{kind} does not select the pods: {selector}"

    used = [container[probe]["httpGet"]["port"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")]
    used += [port["targetPort"] for port in one(items, "Service")["spec"]["ports"]]
    if one(items, "PodMonitor"):
        used += [endpoint["port"] for endpoint in one(items, "PodMonitor")["spec"]["podMetricsEndpoints"]]
    if one(items, "NetworkPolicy"):
        used += [port["port"] for rule in one(items, "NetworkPolicy")["spec"]["ingress"] for port in rule["ports"]]
    if set(used) != ports.keys():
        yield f"ports: {used}, the container has {ports}"

    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    config_map = next((item for item in items if item["metadata"]["name"] == volumes["config"]["configMap"]["name"]), None)
    if config_map is None:
        yield f"no ConfigMap {volumes['config']['configMap']['name']}"
        return
    config = tomllib.loads(config_map["data"]["rerankd.toml"])
    if volumes["cache"]["persistentVolumeClaim"]["claimName"] != one(items, "PersistentVolumeClaim")["metadata"]["name"]:
        yield "no PersistentVolumeClaim for the cache"
    if config["port"] != ports["http"]:
        yield f"port {config['port']} of rerankd.toml is not the container's {ports['http']}"
    if pod["terminationGracePeriodSeconds"] < config["shutdown-grace"] + config["drain-timeout"] + 5:
        yield "terminationGracePeriodSeconds is shorter than the drain"
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    folder, file = os.path.split(config["api-key-file"])
    if file not in [entry["path"] for entry in mounts.get(folder, {}).get("secret", {}).get("items", [])]:
        yield f"no Secret is mounted at {config['api-key-file']}"
    scalers = [one(items, kind) for kind in ("ScaledObject", "HorizontalPodAutoscaler") if one(items, kind)]
    for scaler in scalers:
        if scaler["spec"]["scaleTargetRef"]["name"] != deployment["metadata"]["name"]:
            yield f"{name_of(scaler)} scales another Deployment"
    if bool(scalers) == ("replicas" in spec):
        yield "the number of pods is set twice, or not at all"
    if not re.fullmatch(r"rerankd:(cpu|full)", container["image"]):
        yield f"image {container['image']} is neither rerankd:cpu nor rerankd:full"


def check_queries(items):
    """PromQL of ScaledObject and of the adapter's rules."""
    queries = [trigger["metadata"]["query"] for item in items if item["kind"] == "ScaledObject" for trigger in item["spec"]["triggers"]]
    if one(items, "HorizontalPodAutoscaler"):
        rules = yaml.safe_load((KUBERNETES / "components/hpa/prometheus-adapter.yaml").read_text())["rules"]["custom"]
        served = {rule["name"]["as"] for rule in rules}
        for metric in one(items, "HorizontalPodAutoscaler")["spec"]["metrics"]:
            if metric["pods"]["metric"]["name"] not in served:
                yield f"no rule of the adapter for {metric['pods']['metric']['name']}"
        filled = [rule["metricsQuery"].replace("<<.LabelMatchers>>", 'pod="p"').replace("<<.GroupBy>>", "pod") for rule in rules]
        queries += filled + [rule["seriesQuery"] for rule in rules]
    listed = set(re.findall(r"`(rerankd_\w+)`", (REPOSITORY / "docs/operations.md").read_text()))
    for query in queries:
        try:
            promql_parser.parse(query)
        except ValueError as error:
            yield f"{query}: {error}"
        for metric in re.findall(r"rerankd_\w+", query):
            if re.sub("_(sum|count|bucket)$", "", metric) not in listed:
                yield f"docs/operations.md has no metric {metric}"


def check_config(items):
    """rerankd reads its config file. `health` exits with 1 if no server answers, and with 2 or 78 if the file is wrong."""
    for item in items:
        if item["kind"] != "ConfigMap":
            continue
        with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
            file.write(item["data"]["rerankd.toml"])
            file.flush()
            command = [RERANKD, "health", "--config", file.name, "--host", "127.0.0.1", "--port", "1"]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 1:
            yield f"rerankd.toml: {done.stderr.strip()}"


CHECKS = [check_schemas, check_custom, check_pods, check_servers, check_queries, check_config]


def problems(items, checks):
    """The problems of the first check that finds any. Later checks rely on earlier ones."""
    return next((found for found in (list(check(items)) for check in checks) if found), [])


def planted(items):
    """Copies with one mistake each: (what, items)."""

    def mistake(what, kind, change):
        changed = copy.deepcopy(items)
        change(one(changed, kind))
        return what, changed

    def container(deployment):
        return deployment["spec"]["template"]["spec"]["containers"][0]

    def edit_config(old, new):
        def change(config_map):
            assert old in config_map["data"]["rerankd.toml"]
            config_map["data"]["rerankd.toml"] = config_map["data"]["rerankd.toml"].replace(old, new)

        return change

    deployment, pod = "Deployment", lambda item: item["spec"]["template"]["spec"]
    yield mistake("unknown field", deployment, lambda item: container(item)["livenessProbe"].update(failureTreshold=3))
    yield mistake("wrong type", deployment, lambda item: pod(item).update(terminationGracePeriodSeconds="45s"))
    yield mistake("missing field", deployment, lambda item: item["spec"].pop("selector"))
    yield mistake("selector", "PodDisruptionBudget", lambda item: item["spec"]["selector"].update(matchLabels={"app": "other"}))
    yield mistake("short grace", deployment, lambda item: pod(item).update(terminationGracePeriodSeconds=30))
    yield mistake("service links", deployment, lambda item: pod(item).pop("enableServiceLinks"))
    yield mistake("root", deployment, lambda item: pod(item)["securityContext"].pop("runAsNonRoot"))
    yield mistake("port", "Service", lambda item: item["spec"]["ports"][0].update(targetPort="https"))
    yield mistake("key of the config file", "ConfigMap", edit_config("shutdown-grace = 5\n", "shutdown-grace = 5\nmax-docs = 3\n"))
    yield mistake("port of the config file", "ConfigMap", edit_config("port = 8080", "port = 8081"))
    yield mistake("unknown field of ScaledObject", "ScaledObject", lambda item: item["spec"].update(minReplicas=2))
    yield mistake("wrong type in PodMonitor", "PodMonitor", lambda item: item["spec"]["podMetricsEndpoints"][0].update(path=1))
    trigger = lambda item: item["spec"]["triggers"][0]["metadata"]
    yield mistake("unknown metric", "ScaledObject", lambda item: trigger(item).update(query="rate(rerankd_wait_sum[2m])"))
    yield mistake("PromQL", "ScaledObject", lambda item: trigger(item).update(query="sum(rate(rerankd_queue_seconds_sum[2m])"))


def main():
    command = renderer()
    checks = [check for check in CHECKS if check is not check_custom or install_types()]
    if not RERANKD.exists():
        print(f"SKIPPED: rerankd.toml, because {RERANKD} does not exist")
        checks.remove(check_config)
    sets = {name: render(command, *what) for name, what in RENDERED.items()}
    sets["rank-job.yaml"] = list(yaml.safe_load_all((KUBERNETES / "rank-job.yaml").read_text()))
    failed = False
    for name, items in sets.items():
        found = problems(items, checks)
        print(f"{'FAIL' if found else 'ok  '}  {name}: {', '.join(sorted(item['kind'] for item in items))}")
        for problem in found:
            print(f"      {problem}")
        failed |= bool(found)
    needs = {"unknown field of ScaledObject": check_custom, "wrong type in PodMonitor": check_custom, "key of the config file": check_config}
    for what, items in planted(sets["cpu with keda"]):
        if needs.get(what, check_schemas) not in checks:
            continue
        found = problems(items, checks)
        print(f"{'ok  ' if found else 'FAIL'}  planted mistake, {what}: {found[0][:110] if found else 'not found'}")
        failed |= not found
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
