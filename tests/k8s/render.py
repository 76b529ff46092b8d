"""Renders a kustomization of k8s/ as `kubectl kustomize` would, for tests on machines without it.

What the project's manifests use and no more: resources (files, folders), components, configMapGenerator (literals, files,
behavior: merge, options), patches (strategic merge, $patch: delete; JSON 6902, with target), images, configurations (accepted; names of
ConfigMaps are replaced wherever a pod refers to them). Anything else is an error, so that a manifest cannot use what is
not tested. test_manifests.py compares the result with that of kubectl where there is one.

    render.py FOLDER     prints the documents
"""
import copy
import hashlib
import json
import os
import sys

import yaml

FIELDS = {"apiVersion", "kind", "resources", "components", "configMapGenerator", "patches", "images", "configurations"}

# Lists that a strategic merge joins by a key; all others are replaced.
MERGE_KEYS = {"containers": "name", "initContainers": "name", "volumes": "name", "env": "name",
              "volumeMounts": "mountPath", "ports": "containerPort", "topologySpreadConstraints": "topologyKey"}


class RenderError(Exception):
    pass


class StrictLoader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error."""


def _mapping(loader, node, deep=False):
    keys = [loader.construct_object(k, deep=True) for k, _ in node.value]
    for k in keys:
        if keys.count(k) > 1:
            raise RenderError(f"{node.start_mark}: the key {k} stands twice")
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load_all(path):
    with open(path) as f:
        return [d for d in yaml.load_all(f, StrictLoader) if d is not None]


def _id(doc):
    return doc["kind"], doc["metadata"]["name"]


# ---- patches ----

def _merge(base, patch):
    """Strategic merge of patch into base."""
    for key, value in patch.items():
        if value is None:
            base.pop(key, None)
        elif isinstance(value, dict) and isinstance(base.get(key), dict):
            if key == "emptyDir" or key == "persistentVolumeClaim":
                base[key].update(value)
            else:
                _merge(base[key], value)
        elif isinstance(value, list) and key in MERGE_KEYS and isinstance(base.get(key), list):
            by = MERGE_KEYS[key]
            for item in value:
                old = next((b for b in base[key] if b[by] == item[by]), None)
                if old is None:
                    base[key].append(copy.deepcopy(item))
                else:
                    _merge(old, item)
        else:
            base[key] = copy.deepcopy(value)


def _json6902(doc, operations):
    for o in operations:
        steps = [s.replace("~1", "/").replace("~0", "~") for s in o["path"].split("/")[1:]]
        at = doc
        for s in steps[:-1]:
            try:
                at = at[int(s)] if isinstance(at, list) else at[s]
            except (KeyError, IndexError, ValueError):
                raise RenderError(f"{_id(doc)}: patch {o['path']}: {s} is not there") from None
        last = steps[-1]
        if isinstance(at, list):
            if o["op"] == "add" and last == "-":
                at.append(copy.deepcopy(o["value"]))
                continue
            last = int(last)
            if last >= len(at):
                raise RenderError(f"{_id(doc)}: patch {o['path']}: the list is shorter")
        elif last not in at and o["op"] != "add":
            raise RenderError(f"{_id(doc)}: patch {o['path']}: nothing to {o['op']}")
        if o["op"] == "remove":
            del at[last]
        elif o["op"] == "add" and isinstance(at, list):
            at.insert(last, copy.deepcopy(o["value"]))
        elif o["op"] in ("add", "replace"):
            at[last] = copy.deepcopy(o["value"])
        else:
            raise RenderError(f"patch: op {o['op']} is not used here")


def _apply_patch(docs, patch, folder):
    text = patch.get("patch")
    if text is None:
        with open(os.path.join(folder, patch["path"])) as f:
            text = f.read()
    body = yaml.load(text, StrictLoader)
    target = patch.get("target") or {"kind": body["kind"], "name": body["metadata"]["name"]}
    hit = [d for d in docs if _id(d) == (target["kind"], target["name"])]
    if not hit:
        raise RenderError(f"{folder}: patch of {target['kind']} {target['name']}: no such resource")
    for d in hit:
        if isinstance(body, list):
            _json6902(d, body)
        elif body.get("$patch") == "delete":
            docs.remove(d)
        else:
            _merge(d, {k: v for k, v in body.items() if k not in ("apiVersion", "kind")})


# ---- ConfigMaps ----

def _generate(docs, g, folder):
    if set(g) - {"name", "literals", "files", "behavior", "options"}:
        raise RenderError(f"{folder}: configMapGenerator: unknown fields {sorted(g)}")
    data = {}
    for literal in g.get("literals", []):
        key, _, value = literal.partition("=")
        data[key] = value
    for entry in g.get("files", []):
        key, _, path = entry.rpartition("=")
        with open(os.path.join(folder, path)) as f:
            data[key or os.path.basename(path)] = f.read()
    if g.get("behavior") == "merge":
        old = next((d for d in docs if _id(d) == ("ConfigMap", g["name"])), None)
        if old is None:
            raise RenderError(f"{folder}: ConfigMap {g['name']}: nothing to merge with")
        old["data"].update(data)
        return
    options = g.get("options", {})
    doc = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": g["name"]}, "data": data}
    if options.get("labels"):
        doc["metadata"]["labels"] = dict(options["labels"])
    if not options.get("disableNameSuffixHash"):
        doc["_hash"] = True
    docs.append(doc)


def _hash(doc):
    """kustomize's suffix: SHA-256 of the data as JSON, ten characters, none of which spells a word."""
    text = json.dumps({"data": doc["data"], "kind": "ConfigMap", "name": ""}, sort_keys=True,
                      separators=(",", ":"), ensure_ascii=False)
    for c, escaped in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
        text = text.replace(c, escaped)
    return hashlib.sha256(text.encode()).hexdigest()[:10].translate(str.maketrans("013ae", "ghkmt"))


def _rename(node, names):
    """References of pods to ConfigMaps."""
    if isinstance(node, dict):
        for key in ("configMapRef", "configMap", "configMapKeyRef"):
            ref = node.get(key)
            if isinstance(ref, dict) and ref.get("name") in names:
                ref["name"] = names[ref["name"]]
        for v in node.values():
            _rename(v, names)
    elif isinstance(node, list):
        for v in node:
            _rename(v, names)


def _images(node, images):
    if isinstance(node, dict):
        for key in ("containers", "initContainers"):
            for c in node.get(key) or []:
                name = c["image"].split("@")[0]
                if ":" in name.rsplit("/", 1)[-1]:
                    name = name.rsplit(":", 1)[0]
                for i in images:
                    if i["name"] == name:
                        c["image"] = i.get("newName", name) + (
                            "@" + i["digest"] if "digest" in i else ":" + i["newTag"] if "newTag" in i else "")
        for v in node.values():
            _images(v, images)
    elif isinstance(node, list):
        for v in node:
            _images(v, images)


def _build(folder, docs):
    """Adds what the kustomization of folder holds to docs, and changes docs as it says."""
    k = load_all(os.path.join(folder, "kustomization.yaml"))[0]
    if set(k) - FIELDS:
        raise RenderError(f"{folder}: fields that are not used here: {sorted(set(k) - FIELDS)}")
    for r in k.get("resources", []):
        path = os.path.join(folder, r)
        new = _build(path, []) if os.path.isdir(path) else load_all(path)
        for d in new:
            if _id(d) in [_id(x) for x in docs]:
                raise RenderError(f"{folder}: {_id(d)} stands twice")
        docs.extend(copy.deepcopy(new))
    for g in k.get("configMapGenerator", []):
        _generate(docs, g, folder)
    for c in k.get("components", []):
        _build(os.path.join(folder, c), docs)
    for p in k.get("patches", []):
        _apply_patch(docs, p, folder)
    _images(docs, k.get("images", []))
    return docs


def render(folder):
    docs = _build(folder, [])
    names = {}
    for d in docs:
        if d.pop("_hash", False):
            names[d["metadata"]["name"]] = f"{d['metadata']['name']}-{_hash(d)}"
            d["metadata"]["name"] = names[d["metadata"]["name"]]
    _rename(docs, names)
    return docs


if __name__ == "__main__":
    yaml.safe_dump_all(render(sys.argv[1]), sys.stdout, sort_keys=False)
