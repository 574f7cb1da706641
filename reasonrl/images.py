from reasonrl.records import InputError


class BadImage(InputError): ...


def decode(images):
    from PIL import Image
    return [Image.open(i).convert("RGB") if isinstance(i, str) else i.draw() for i in images]
