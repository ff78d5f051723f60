"""A small stand-in for the hub's HTTP interface that keeps repositories as folders: enough of it to upload and download.

    python tests/hub_stand.py FOLDER PORT

It serves real files to the real client (`huggingface_hub`, with HF_ENDPOINT).
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import uvicorn
import yaml
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse

COMMIT = "0" * 40


def app_of(folder: Path) -> FastAPI:
    """The interface over the repositories in a folder."""
    app = FastAPI()

    @app.post("/api/repos/create")
    async def create(request: Request) -> dict[str, str]:
        asked = await request.json()
        name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
        (folder / name).mkdir(parents=True, exist_ok=True)
        return {"url": f"{request.base_url}{name}", "name": name}

    @app.post("/api/validate-yaml")
    async def validate(request: Request) -> dict[str, Any]:
        header = (await request.json())["content"].split("---")[1]
        wrong = [] if isinstance(yaml.safe_load(header), dict) else [{"message": "no YAML"}]
        return {"errors": wrong, "warnings": []}

    @app.post("/api/models/{owner}/{name}/preupload/{revision}")
    async def preupload(request: Request) -> dict[str, Any]:
        files = (await request.json())["files"]
        return {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]}

    @app.post("/api/models/{owner}/{name}/commit/{revision}")
    async def commit(owner: str, name: str, request: Request) -> dict[str, Any]:
        for line in (await request.body()).splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                file = folder / owner / name / entry["value"]["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(entry["value"]["content"]))
        return {"commitUrl": f"{request.base_url}{owner}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}

    @app.get("/api/models/{owner}/{name}")
    @app.get("/api/models/{owner}/{name}/revision/{revision}")
    async def info(owner: str, name: str) -> Response:
        files = sorted(path for path in (folder / owner / name).rglob("*") if path.is_file())
        if not files:
            return JSONResponse({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        siblings = [{"rfilename": str(path.relative_to(folder / owner / name))} for path in files]
        return JSONResponse({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})

    @app.get("/api/models/{owner}/{name}/tree/{revision}")
    async def tree(owner: str, name: str) -> list[dict[str, Any]]:
        place = folder / owner / name
        files = sorted(path for path in place.rglob("*") if path.is_file())
        facts = ((str(path.relative_to(place)), path.stat().st_size) for path in files)
        return [{"type": "file", "path": path, "size": size, "oid": COMMIT} for path, size in facts]

    @app.api_route("/{owner}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
    async def resolve(owner: str, name: str, path: str) -> Response:
        file = folder / owner / name / path
        if not file.is_file():
            return JSONResponse({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        return FileResponse(file, headers={"X-Repo-Commit": COMMIT, "ETag": f'"{digest}"'})

    return app


if __name__ == "__main__":
    uvicorn.run(app_of(Path(sys.argv[1])), port=int(sys.argv[2]), log_level="error")
