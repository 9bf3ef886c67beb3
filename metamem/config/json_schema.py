"""The config as a JSON Schema (draft 2020-12), with which editors complete and check the YAML.

It holds what types and ranges say. It requires little, since a file may leave to `extends` what it does not set.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from metamem.config.convert import DOTTED, LISTS, ONE_OR_MORE, ByName, Range, key_of, schema_fields
from metamem.config.schema import Config, NetworkConfig
from metamem.registry import MODULES, TASKS, TRACKERS, Registry, is_module, is_module_mapping

Schema = dict[str, Any]

_REFERENCE: Schema = {"type": "string", "pattern": r"\$\{"}
_SCALARS = {bool: "boolean", int: "integer", float: "number"}
_BOUNDS = {"low": "minimum", "high": "maximum", "above": "exclusiveMinimum", "below": "exclusiveMaximum"}


def json_schema() -> Schema:
    """The schema of a config file, with the options of everything that is registered."""
    definitions: Schema = {}
    top = _top(Config, definitions)
    top["properties"]["task"] = entries(TASKS, definitions)
    definitions["Module"] = entries(MODULES, definitions)
    definitions[NetworkConfig.__name__]["properties"]["modules"]["additionalProperties"] = {
        "anyOf": [_ref("Module"), _REFERENCE]
    }
    return _document("metamem config", top, definitions)


def schema_of(cls: Any, title: str, registries: Mapping[str, Registry[Any]]) -> Schema:
    """The schema of a file that a dataclass describes; `registries`: of what its keys name an entry."""
    definitions: Schema = {}
    top = _top(cls, definitions)
    for key, registry in registries.items():
        top["properties"][key] = entries(registry, definitions)
    return _document(title, top, definitions)


def _top(cls: Any, definitions: Schema) -> Schema:
    root = _schema(cls, definitions)
    top = definitions.pop(root["$ref"].rpartition("/")[2])
    files = _schema(str, definitions)
    top["properties"]["extends"] = {"anyOf": [files, {"type": "array", "items": files}]}
    for part in list(definitions.values()):
        if "trackers" in part.get("properties", {}):
            part["properties"]["trackers"] = _trackers(definitions)
    return top


def _document(title: str, top: Schema, definitions: Schema) -> Schema:
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, **top, "$defs": definitions}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _schema(annotation: Any, definitions: Schema, in_list: bool = False) -> Schema:
    origin, arguments = get_origin(annotation) or annotation, get_args(annotation)
    if origin is Annotated:
        schema: Schema = _schema(arguments[0], definitions)
        for mark in arguments[1:]:
            if isinstance(mark, Range):
                bounds = {_BOUNDS[key]: bound for key, bound in dataclasses.asdict(mark).items() if bound is not None}
                schema = {"anyOf": [{**schema["anyOf"][0], **bounds}, *schema["anyOf"][1:]]}
            elif isinstance(mark, ByName):
                item = _schema(get_args(arguments[0])[0], definitions)
                named = {"type": "object", "additionalProperties": {"anyOf": [item, {"type": "null"}]}}
                schema = {"anyOf": [schema, named]}
            elif mark == DOTTED:
                schema = {**schema, "pattern": r"\."}
            elif mark == ONE_OR_MORE:
                schema = {"anyOf": [schema["items"], {**schema, "minItems": 1}]}
        return schema
    if origin in (Union, types.UnionType):
        options = [_schema(option, definitions) for option in arguments]
        flat = [part for option in options for part in option.get("anyOf", [option])]
        return {"anyOf": [part for i, part in enumerate(flat) if part not in flat[:i]]}
    if origin is Literal:
        return {"anyOf": [{"enum": list(arguments)}, _REFERENCE]}
    if annotation in (None, types.NoneType):
        return {"type": "null"}
    if origin is str:
        return {"type": "string"}
    if origin in _SCALARS:
        return {"anyOf": [{"type": _SCALARS[origin]}, _REFERENCE]}
    if origin in LISTS or (origin is tuple and (not arguments or arguments[-1] is ...)):
        return {"type": "array", "items": _schema((*arguments, Any)[0], definitions, in_list=True)}
    if origin is tuple:
        items = [_schema(item, definitions) for item in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema((*arguments, Any, Any)[1], definitions)}
    if dataclasses.is_dataclass(annotation):
        return _dataclass(annotation, definitions, in_list)
    return {}


def _dataclass(cls: Any, definitions: Schema, in_list: bool) -> Schema:
    fields = list(schema_fields(cls))
    if cls.__name__ not in definitions:
        definitions[cls.__name__] = {}
        hints = get_type_hints(cls, include_extras=True)
        properties: Schema = {}
        for field in fields:
            schema = _schema(hints[field.name], definitions)
            if field.default is not dataclasses.MISSING:
                schema = {**schema, "default": field.default}
            properties[key_of(field)] = schema
        definitions[cls.__name__] = {
            "type": "object",
            "description": " ".join((cls.__doc__ or "").split()),
            "properties": properties,
            "additionalProperties": False,
        }
    # Lists replace when files merge, so that an item is whole; a mapping may be completed by another file.
    missing = dataclasses.MISSING
    required = [key_of(field) for field in fields if field.default is missing and field.default_factory is missing]
    return {**_ref(cls.__name__), **({"required": required} if in_list and required else {})}


def entries(registry: Registry[Any], definitions: Schema) -> Schema:
    """Of each registered name its options, of a dotted path any; and, for a file that changes another's entry, options
    without the name."""
    known: list[Schema] = []
    for name in registry:
        properties: Schema = {registry.key: {"const": name}}
        for option, (annotation, default) in registry.options(name).items():
            properties[option] = _option(annotation, definitions)
            if isinstance(default, bool | int | float | str | list | tuple | None):
                properties[option] = {**properties[option], "default": default}
        if registry is MODULES and name == "network":
            network = definitions[NetworkConfig.__name__]["properties"]
            properties = {**properties, "modules": network["modules"], "connections": network["connections"]}
        known.append(
            {"type": "object", "properties": properties, "required": [registry.key], "additionalProperties": False}
        )
    own = {"type": "object", "properties": {registry.key: {"type": "string", "pattern": r"\."}}}
    unnamed = {"type": "object", "not": {"required": [registry.key]}}
    return {"anyOf": [*known, {**own, "required": [registry.key]}, unnamed]}


def _trackers(definitions: Schema) -> Schema:
    """Names of trackers, or a mapping of names to their options."""
    known = {
        name: {
            "type": "object",
            "properties": {key: _option(kind, definitions) for key, (kind, _) in TRACKERS.options(name).items()},
            "additionalProperties": False,
        }
        for name in TRACKERS
    }
    listed = {"type": "array", "items": {"enum": list(known)}}
    return {"anyOf": [listed, {"type": "object", "properties": known, "additionalProperties": False}]}


def _option(annotation: Any, definitions: Schema) -> Schema:
    module = {"anyOf": [_ref("Module"), _REFERENCE]}
    if is_module_mapping(annotation):
        return {"anyOf": [{"type": "object", "additionalProperties": module}, _REFERENCE]}
    return module if is_module(annotation) else _schema(annotation, definitions)
