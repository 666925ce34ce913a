"""Packaging. Everything that can change is read from settings.ini, the one place for it; nothing is repeated here."""
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
settings = ConfigParser(delimiters=["="])
with open(HERE / "settings.ini", encoding="utf-8") as file:
    settings.read_file(file)
settings = settings["DEFAULT"]

STATUS = {"1": "1 - Planning", "2": "2 - Pre-Alpha", "3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}
SPDX = {"apache2": "Apache-2.0"}  # of the names that nbdev gives to licences
FIRST, LAST = (int(settings[key].split(".")[1]) for key in ("min_python", "max_python"))
PYTHONS = [f"3.{minor}" for minor in range(FIRST, LAST + 1)]
EXTRAS = {key.removesuffix("_requirements"): its for key, its in settings.items() if key.endswith("_requirements")}
EXTRAS["all"] = f"{settings['lib_name']}[{','.join(extra for extra in EXTRAS if extra != 'dev')}]"


def outside_a_checkout(readme: str) -> str:
    """README.md as a page on its own: links to files of the checkout lead to the repository; code is left alone."""

    def absolute(found: re.Match) -> str:
        kind = "raw" if found[0].startswith("!") else "blob"  # a picture is shown, a page is opened
        return f"{found[1]}{settings['git_url']}/{kind}/{settings['branch']}/" if found[1] else found[0]

    code = r"^```.*?^```$|`[^`\n]*`"
    return re.sub(rf"{code}|(!?\[[^\]]*\]\()(?!\w+:|#|/)", absolute, readme, flags=re.M | re.S)


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=outside_a_checkout((HERE / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    license_expression=SPDX[settings["license"]],
    license_files=["LICENSE"],
    project_urls={"Source": settings["git_url"], "Issues": f"{settings['git_url']}/issues"},
    keywords=[word.strip() for word in settings["keywords"].split(",")],
    classifiers=[
        f"Development Status :: {STATUS[settings['status']]}",
        f"Intended Audience :: {settings['audience']}",
        f"Natural Language :: {settings['language']}",
        *(f"Programming Language :: Python :: {version}" for version in PYTHONS),
    ],
    packages=find_packages(include=[settings["lib_name"], f"{settings['lib_name']}.*"]),
    package_data={settings["lib_name"]: ["py.typed"]},
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require={extra: its.split() for extra, its in EXTRAS.items()},
    entry_points={
        "console_scripts": settings["console_scripts"].split(),
        "nbdev": [f"{settings['lib_name']}={settings['lib_name']}._modidx:d"],
    },
    zip_safe=False,
)
