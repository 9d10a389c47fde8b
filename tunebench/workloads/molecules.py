"""Everyday names of molecules, and what ASE's G2 collection calls them.

The collection's own names (``CH3CH2OH`` ...) are accepted as well. Nothing is imported here, so that a study file can
be checked without loading ASE.
"""

from __future__ import annotations

MOLECULES: dict[str, str] = {
    "acetaldehyde": "CH3CHO",
    "acetamide": "CH3CONH2",
    "acetic-acid": "CH3COOH",
    "acetone": "CH3COCH3",
    "acetonitrile": "CH3CN",
    "ammonia": "NH3",
    "benzene": "C6H6",
    "butadiene": "butadiene",
    "dimethyl-ether": "CH3OCH3",
    "dimethyl-sulfoxide": "C2H6SO",
    "dimethylamine": "C2H6NH",
    "ethane": "C2H6",
    "ethanethiol": "CH3CH2SH",
    "ethanol": "CH3CH2OH",
    "ethylamine": "CH3CH2NH2",
    "ethylene": "C2H4",
    "formaldehyde": "H2CO",
    "furan": "C4H4O",
    "glyoxal": "OCHCHO",
    "hydrogen-peroxide": "H2O2",
    "isobutane": "isobutane",
    "isopropanol": "C2H6CHOH",
    "methane": "CH4",
    "methanethiol": "CH3SH",
    "methanol": "CH3OH",
    "methyl-formate": "HCOOCH3",
    "methylamine": "H3CNH2",
    "nitromethane": "CH3NO2",
    "propane": "C3H8",
    "pyridine": "C5H5N",
    "pyrrole": "C4H4NH",
    "thiophene": "C4H4S",
    "trimethylamine": "C3H9N",
    "water": "H2O",
}
