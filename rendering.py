"""Selection of the OpenGL backend, before importing dm_control, which reads `MUJOCO_GL` only once."""

import contextlib
import functools
import importlib
import json
import os
import subprocess
import sys

from endings import Refused, signals_kept_from_children

DEBIAN_PACKAGES = {
    "egl": "libegl1 libopengl0 libgl1-mesa-dri",
    "osmesa": "libosmesa6",
    "glfw": "libglfw3 and a display",
}
DRAWING_OFF = ("off", "disable", "disabled", "false", "0")  # dm_control's names


def select_gl_backend(required=True, cuda=False):
    """Choose a rendering backend, set `MUJOCO_GL` to it and return its name; call before importing dm_control.

    If `MUJOCO_GL` is unset, EGL is tried first, then OSMesa (on Linux), or GLFW (elsewhere). Each try is a process
    of its own, since a backend that fails half-way leaves PyOpenGL bound to it. If none works, this switches rendering
    off; if rendering is `required`, it raises `Refused`. With `cuda`, EGL draws on torch's GPU if it can.
    """
    if "dm_control" in sys.modules:  # too late to choose
        return importlib.import_module("dm_control._render").BACKEND
    # Mesa's software renderer and triton each bring an LLVM of their own. A process that loads Mesa's first (as it
    # imports dm_control) dies with a segmentation fault when torch, sooner or later, imports triton; the other order
    # works.
    with contextlib.suppress(ImportError):
        importlib.import_module("triton")
    asked = os.environ.get("MUJOCO_GL", "").lower()
    candidates = [asked] if asked else ["egl", "osmesa"] if sys.platform == "linux" else ["glfw"]
    if cuda and "egl" in candidates and "MUJOCO_EGL_DEVICE_ID" not in os.environ:
        _draw_on_gpu()
    works = next((backend for backend in candidates if backend not in DRAWING_OFF and renderer(backend)), None)
    if required and not works:
        raise Refused(_why_nothing_draws(asked, candidates))
    os.environ["MUJOCO_GL"] = works or DRAWING_OFF[0]
    os.environ.pop("PYOPENGL_PLATFORM", None)  # as in the probe
    return os.environ["MUJOCO_GL"]


def _why_nothing_draws(asked, candidates):
    """The message of the refusal, one line."""
    if asked in DRAWING_OFF:
        return f"MUJOCO_GL={asked}: switches drawing off; unset it, or use one of {', '.join(DEBIAN_PACKAGES)}"
    packages = " or ".join(f"{DEBIAN_PACKAGES[b]} ({b})" for b in candidates if b in DEBIAN_PACKAGES)
    if not packages:
        return f"MUJOCO_GL={asked}: cannot render; use one of {', '.join(DEBIAN_PACKAGES)}"
    device = os.environ.get("MUJOCO_EGL_DEVICE_ID")
    if device is not None and "egl" in candidates and (found := egl_devices()):
        devices = ", ".join(map(str, range(len(found))))
        return f"MUJOCO_EGL_DEVICE_ID={device}: cannot render on that device; the devices here: {devices}"
    setting = f"MUJOCO_GL={asked}" if asked else f"MUJOCO_GL is not set, tried {', '.join(candidates)}"
    return f"{setting}: cannot render; install the Debian packages {packages}"


def _draw_on_gpu():
    """Make EGL draw on torch's GPU, CUDA's device 0, if it can; EGL numbers devices in an order of its own."""
    devices = egl_devices()
    if 0 in devices:
        os.environ["MUJOCO_EGL_DEVICE_ID"] = str(devices.index(0))
        if not renderer("egl"):
            del os.environ["MUJOCO_EGL_DEVICE_ID"]
            renderer.cache_clear()


@functools.cache
def egl_devices():
    """CUDA's number, relative to CUDA_VISIBLE_DEVICES, of each EGL device; None for one without, such as Mesa's."""
    script = (
        "import ctypes, json, os\n"
        "os.environ.pop('MUJOCO_EGL_DEVICE_ID', None)\n"  # an invalid one fails the next import
        "from dm_control._render.pyopengl import egl_ext as egl\n"
        "kind = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(ctypes.c_ssize_t))\n"
        "query, number = kind(egl.eglGetProcAddress('eglQueryDeviceAttribEXT')), ctypes.c_ssize_t()\n"
        "cuda_device = 0x323A\n"  # EGL_CUDA_DEVICE_NV
        "print(json.dumps([number.value if query(device, cuda_device, number) else None\n"
        "                  for device in egl.eglQueryDevicesEXT(64)]))"
    )
    return json.loads(_probe(script, "egl") or "[]")


@functools.cache  # a second or more each time
def renderer(backend):
    """The backend's GL_RENDERER string, such as "llvmpipe (LLVM 15.0.6, 256 bits)"; None if it cannot render."""
    draw = (
        "from dm_control import mujoco; from OpenGL import GL\n"
        "physics = mujoco.Physics.from_xml_string('<mujoco/>'); physics.render(16, 16)\n"
        "with physics.contexts.gl.make_current() as context: name = context.call(GL.glGetString, GL.GL_RENDERER)\n"
        "print(name.decode())"
    )
    return _probe(draw, backend)


def _probe(script, backend):
    """Last line printed by a script that runs in its own process with this backend; None if it fails."""
    environment = {**os.environ, "MUJOCO_GL": backend}
    # PyOpenGL's own variable must agree with MUJOCO_GL; each backend sets it if it is unset
    environment.pop("PYOPENGL_PLATFORM", None)
    with signals_kept_from_children():
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    return done.stdout.splitlines()[-1] if done.returncode == 0 and done.stdout else None
