"""URLs, from real servers on the loopback: within limits of size and time, and not into the network behind."""

import base64
import io
import shutil
import socket
import ssl
import subprocess
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import soundfile

from modeling_lsm import fetching_lsm, load_waveform
from modeling_lsm.fetching_lsm import is_public
from tests.tiny import ask, noise


CLIP = noise(0.5)
HERE = ("127.0.0.1",)


def wave_bytes() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, CLIP, 16_000, format="WAV", subtype="FLOAT")
    return file.getvalue()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    seen = []

    def do_GET(self):
        self.seen.append((self.path, dict(self.headers)))
        name = self.path.strip("/").partition("?")[0].replace("-", "_").replace("%20", "_")
        getattr(self, f"get_{name}", self.get_missing)()

    def log_message(self, *args):
        pass

    def answer(self, status, content=b"", **headers):
        self.send_response(status)
        for header, value in {"Content_Length": str(len(content)), **headers}.items():
            if value is not None:
                self.send_header(header.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def get_clip(self):
        self.answer(200, wave_bytes())

    get_a_clip = get_clip

    def get_chunked(self):
        self.answer(200, Content_Length=None, Transfer_Encoding="chunked")
        for start in range(0, len(wave_bytes()), 999):
            piece = wave_bytes()[start : start + 999]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")

    def get_to_the_end(self):
        self.close_connection = True
        self.answer(200, wave_bytes(), Content_Length=None, Connection="close")

    def get_missing(self):
        self.answer(404, b"not here")

    def get_broken(self):
        self.answer(500)

    def get_empty(self):
        self.answer(200)

    def get_page(self):
        self.answer(200, b"<html>Log in first.</html>" * 50)

    def get_declares_much(self):
        self.answer(200, Content_Length=str(10**12))

    def get_endless(self):
        self.close_connection = True
        self.answer(200, Content_Length=None, Connection="close")
        while True:
            self.wfile.write(b"\0" * 65_536)

    def get_cut_off(self):
        self.close_connection = True
        self.answer(200, wave_bytes()[:1000], Content_Length=str(len(wave_bytes())))

    def get_says_nothing(self):
        time.sleep(5)

    def get_drips(self, content=b"RIFF" * 100):
        self.close_connection = True
        self.answer(200, Content_Length=None, Connection="close")
        for byte in content:
            self.wfile.write(bytes([byte]))
            time.sleep(0.1)

    def get_drips_headers(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for number in range(50):
            self.wfile.write(b"X-%d: a\r\n" % number)
            time.sleep(0.1)

    def get_speaks_otherwise(self):
        self.close_connection = True
        self.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")

    def get_moved(self):
        self.answer(302, Location="/moved-again")

    def get_moved_again(self):
        self.answer(308, Location=f"http://127.0.0.1:{self.server.server_port}/clip")

    def get_to_another_host(self):
        self.answer(302, Location=f"http://127.0.0.2:{self.server.server_port}/clip")

    def get_to_its_other_name(self):
        self.answer(302, Location=f"http://localhost:{self.server.server_port}/clip")

    def get_to_metadata(self):
        self.answer(307, Location="http://169.254.169.254/latest/meta-data/")

    def get_to_a_file(self):
        self.answer(302, Location="file:///etc/passwd")

    def get_round_and_round(self):
        self.answer(302, Location="/round-and-round")


@contextmanager
def serving(address, context=None):
    with ThreadingHTTPServer((address, 0), Handler) as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # clients leave
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture(scope="module")
def server():
    with serving("0.0.0.0") as port:  # every loopback address
        yield f"http://127.0.0.1:{port}"


@pytest.mark.parametrize("path", ["clip", "a clip", "clip?sig=a%2Bb/c&x=é", "chunked", "to-the-end", "moved"])
def test_clips(server, path):
    for source in (f"{server}/{path}", {"path": f"{server}/{path}"}, f"{server}/{path}".replace("http", "HTTP")):
        assert np.array_equal(load_waveform(source, private_hosts=HERE, local_files=False), CLIP)
    assert Handler.seen[-1][1]["Host"] == server.removeprefix("http://")


def test_clips_in_chats(server, processor):
    kwargs = {"processor_kwargs": {"private_hosts": HERE, "local_files": False}}
    expected = ask(processor, [{"role": "user", "content": [{"type": "audio", "audio": CLIP}]}])
    for item in (
        {"type": "audio", "url": f"{server}/clip"},
        {"type": "audio", "audio": f"{server}/clip"},
        {"type": "audio_url", "audio_url": {"url": f"{server}/clip"}},
        {"type": "audio_url", "audio_url": "data:audio/wav;base64," + base64.b64encode(wave_bytes()).decode()},
    ):
        inputs = ask(processor, [{"role": "user", "content": [item]}], **kwargs)
        assert all((inputs[key] == expected[key]).all() for key in expected)


@pytest.mark.parametrize(
    ("path", "kind", "message"),
    [
        ("missing", OSError, "127.0.0.1 answers 404 Not Found"),
        ("broken", OSError, "127.0.0.1 answers 500 Internal Server Error"),
        ("empty", ValueError, "is empty"),
        ("page", ValueError, "cannot be decoded"),
        ("declares-much", ValueError, "It has 1000000000000 bytes or more, but at most 100000 are read"),
        ("endless", ValueError, r"It has 1\d{5} bytes or more, but at most 100000 are read. Raise `max_bytes`"),
        ("cut-off", OSError, "127.0.0.1 sent 1000 of 32"),
        ("speaks-otherwise", OSError, "127.0.0.1 broke off or does not speak HTTP: BadStatusLine"),
        ("to-a-file", ValueError, "leads to 'file:///etc/passwd'; expected http:// or https://"),
        ("round-and-round", OSError, "redirects more than 5 times"),
        (
            "to-another-host",
            ValueError,
            r"address of 127\.0\.0\.2 is 127\.0\.0\.2, which is not.*private_hosts",
        ),
        ("to-its-other-name", ValueError, r"address of localhost is (127\.0\.0\.1|::1), which is not public"),
        ("to-metadata", ValueError, r"address of 169\.254\.169\.254 is 169\.254\.169\.254, which is not public"),
    ],
)
def test_what_is_not_read(server, path, kind, message):
    with pytest.raises(kind, match=rf"The audio URL '{server}/{path}' .*{message}") as caught:
        load_waveform(f"{server}/{path}", private_hosts=HERE, max_bytes=100_000, timeout=20)
    assert not isinstance(caught.value, TimeoutError)


@pytest.mark.parametrize("path", ["says-nothing", "drips", "drips-headers"])
def test_what_takes_too_long(server, path):
    """In all: each byte that drips in would begin a socket's own time-out anew."""
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=rf"The audio URL '{server}/{path}' .*took longer than 0.5 seconds"):
        load_waveform(f"{server}/{path}", private_hosts=HERE, timeout=0.5)
    assert time.monotonic() - start < 3


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_tls(tmp_path, monkeypatch):
    """With the certificate of the host that was named, though its address is what was connected to."""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    request = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run(["openssl", *request.split(), "-out", certificate, "-keyout", key], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with serving("127.0.0.1", context) as port:
        url = f"https://localhost:{port}/clip"
        with pytest.raises(OSError, match=f"The audio URL '{url}' cannot be read: .*certificate verify failed"):
            load_waveform(url, private_hosts=("localhost",))
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert np.array_equal(load_waveform(url, private_hosts=("localhost",)), CLIP)
        assert Handler.seen[-1][1]["Host"] == f"localhost:{port}"
        with pytest.raises(OSError, match="certificate verify failed: .*127.0.0.1"):
            load_waveform(url.replace("localhost", "127.0.0.1"), private_hosts=HERE)
        with pytest.raises(TimeoutError, match="took longer than 0.5 seconds"):
            load_waveform(url.replace("clip", "drips"), private_hosts=("localhost",), timeout=0.5)


def test_hosts_that_do_not_answer(server):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    with pytest.raises(OSError, match="cannot be read: .*refused"):
        load_waveform(f"http://127.0.0.1:{port}/a.wav", private_hosts=HERE)
    with pytest.raises(OSError, match="The audio URL 'http://no.such.host.invalid/a.wav' cannot be read"):
        load_waveform("http://no.such.host.invalid/a.wav")
    with pytest.raises(OSError, match="cannot be read: .*(SSL|ssl)"):  # plain HTTP where TLS is expected
        load_waveform(server.replace("http", "https") + "/clip", private_hosts=HERE)


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///a.wav",
        "http://[::1/a.wav",
        "http://host:port/a.wav",
        "http://host:99999999/a.wav",
        "http://" + "a" * 300 + "/a.wav",
        "http://a..b/a.wav",
        "http://\ud800/a.wav",
        "http://a\tb\r\nHost: c/",
    ],
)
def test_urls_that_are_none(url):
    with pytest.raises((ValueError, OSError), match="The audio URL 'http://.*"):
        load_waveform(url)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]"]
)
def test_this_machine_is_not_asked_unless_it_is_named(server, host):
    asked = len(Handler.seen)
    with pytest.raises((ValueError, OSError), match="not public|cannot be read"):
        load_waveform(server.replace("127.0.0.1", host) + "/clip")
    assert len(Handler.seen) == asked


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700:4700::1111", True),
        *((address, False) for address in ("10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1", "169.254.169.254")),
        *((address, False) for address in ("0.0.0.0", "224.0.0.1", "255.255.255.255", "::", "::1", "fe80::1%eth0")),
        *(
            (address, False)
            for address in ("fd00::1", "ff02::1", "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::a00:1")
        ),
        *((address, False) for address in ("::7f00:1", "::ffff:0:7f00:1", "64:ff9b:1::a00:1", "fec0::1", "5f00::1")),
    ],
)
def test_public_addresses(address, public):
    assert is_public(address) is public


def test_one_time_out_for_all_addresses(monkeypatch):
    """A name may have as many addresses that swallow what they are sent as its owner likes."""
    tried = []

    def create_connection(address, timeout):
        tried.append(address[0])
        raise TimeoutError("timed out")

    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"8.8.8.{number}", 80)) for number in range(50)]
    monkeypatch.setattr(fetching_lsm.socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(fetching_lsm.socket, "create_connection", create_connection)
    with pytest.raises(TimeoutError, match="took longer than 60 seconds"):
        load_waveform("http://many.example/a.wav")
    assert tried == ["8.8.8.0"]


def test_a_name_is_resolved_once(server, monkeypatch):
    """A name that has a public address when it is looked at cannot have a private one when it is connected to."""
    answers = iter([[(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("8.8.8.8", 80))]])
    connected = []

    def create_connection(address, timeout):
        connected.append(address)
        raise ConnectionRefusedError("not today")

    monkeypatch.setattr(fetching_lsm.socket, "getaddrinfo", lambda *_, **__: next(answers))
    monkeypatch.setattr(fetching_lsm.socket, "create_connection", create_connection)
    with pytest.raises(OSError, match="not today"):
        load_waveform("http://rebinding.example/a.wav")
    assert connected == [("8.8.8.8", 80)]
