from reasonrl.records import InputError


class BadImage(InputError): ...


def decode(images):
    return [i.draw() for i in images]
