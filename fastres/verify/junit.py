"""Certificates as JUnit XML, which CI servers show: a test case for every site and one for the whole model."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

from fastres.verify.certificate import MODEL, Certificate


def write(certificates: Iterable[Certificate], path: str | os.PathLike[str]) -> None:
    """Writes a file with a suite for each certificate; its folder is made if it is not there."""
    suites = ElementTree.Element("testsuites", name="fastres verify")
    suites.extend([suite(certificate) for certificate in certificates])
    ElementTree.indent(suites)
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    ElementTree.ElementTree(suites).write(file, encoding="utf-8", xml_declaration=True)


def suite(certificate: Certificate) -> ElementTree.Element:
    """One certificate: sites in the order of the forward, the whole model last. A site that did not run fused is
    skipped, with the reason."""
    cases = [_case(certificate, site.name, site.reason) for site in certificate.sites]
    cases.append(_case(certificate, MODEL, ""))
    name = f"{certificate.model} {certificate.mode} {certificate.dtype}"
    found = ElementTree.Element(
        "testsuite",
        name=f"fastres verify {name}",
        tests=str(len(cases)),
        failures=str(sum(case.find("failure") is not None for case in cases)),
        errors="0",
        skipped=str(sum(case.find("skipped") is not None for case in cases)),
        time=str(certificate.seconds),
        timestamp=certificate.date,
    )
    found.extend(cases)
    return found


def _case(certificate: Certificate, site: str, reason: str) -> ElementTree.Element:
    group = f"fastres.verify.{certificate.model}.{certificate.mode}.{certificate.dtype}"
    case = ElementTree.Element("testcase", classname=group, name=site)
    texts = [fault.text for fault in certificate.faults if fault.site == site]
    texts += [row.sentence() for row in certificate.failures if row.site == site]
    if texts:
        first = " (the first in the order of the forward)" if site == certificate.first else ""
        failure = ElementTree.SubElement(case, "failure", message=texts[0] + first, type="ParityError")
        failure.text = "\n".join(texts)
    elif reason:
        ElementTree.SubElement(case, "skipped", message=f"not fused: {reason}")
    return case
