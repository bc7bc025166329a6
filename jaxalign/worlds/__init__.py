"""Embedded worlds: small data sets whose truth is known, so that every gain can be measured."""
