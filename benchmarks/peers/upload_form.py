"""What a small service of one's own does with an upload: UploadFile, json.loads a line, a pydantic model.

Run by uvicorn in a process of its own; see benchmarks/upload_speed.py.
"""

import json
from typing import Annotated, Literal

from fastapi import FastAPI, Form, HTTPException, UploadFile
from pydantic import BaseModel, ConfigDict, Field, ValidationError

app = FastAPI()


class TextPart(BaseModel):
    """A text part of a message."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a row."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    weight: Literal[0, 1] | None = None


class Row(BaseModel):
    """One row of a training file."""

    model_config = ConfigDict(extra="forbid")
    messages: list[Message] = Field(min_length=1)


@app.post("/v1/files")
def create_file(purpose: Annotated[str, Form()], file: UploadFile) -> dict[str, object]:
    """Check every line of a file that the framework has received."""
    num_rows = 0
    for number, line in enumerate(file.file, start=1):
        try:
            row = Row.model_validate(json.loads(line))
        except (ValidationError, ValueError) as error:
            raise HTTPException(400, f"line {number}") from error
        if row.messages[-1].role != "assistant":
            raise HTTPException(400, f"line {number}: the last message must be the assistant's")
        num_rows += 1
    return {"id": f"file-{num_rows}", "purpose": purpose, "bytes": file.size}


@app.get("/readyz")
def ready() -> None:
    """Answer once the process serves."""
