"""Routes of images: build one before it is needed, list what is there."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from rethaw.api import models
from rethaw.api.rooms import Rooms
from rethaw.model.errors import Unavailable
from rethaw.model.ports import Images
from rethaw.model.types import ImageBuilt, ImageInfo, ImageSpec


class ImageBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    image: ImageSpec


class ImageList(BaseModel):
    images: list[ImageInfo]


def router(rooms: Rooms) -> APIRouter:
    api = APIRouter(prefix="/v1/images", responses=models.ERRORS, tags=["images"])

    def here() -> Images:
        if rooms.images is None:
            raise Unavailable("this process has no node, and so no images", remedy="ask the server of a node")
        return rooms.images

    @api.post("")
    async def build(body: ImageBody) -> ImageBuilt:
        """Build it; answers once it is there, at once if it was already."""
        rooms.must_have_image(body.image)
        return await here().build(body.image)

    @api.get("")
    async def found() -> ImageList:
        return ImageList(images=await here().list())

    _ = (build, found)
    return api
