"""What sources find, and shards for them."""

import io
import os
import tarfile

from tir_kernels.fewshot.predict.sources import Sources


def names(*arguments, root=None):
    """The names of all images, relative to a folder if one is given."""
    found = [image.name for image in Sources([str(each) for each in arguments]).share(0, 1)]
    return found if root is None else [os.path.relpath(name, root) for name in found]


def problems(*arguments):
    """The names of those that can't be read, with the reasons."""
    images = Sources([str(each) for each in arguments]).share(0, 1)
    return {image.name: str(image.file) for image in images if isinstance(image.file, Exception)}


def shard(path, *members, mode="w"):
    """A tar file of files with these names."""
    with tarfile.open(path, mode) as tar:
        for name in members:
            info = tarfile.TarInfo(name)
            content = b"content of " + name.encode()
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path
