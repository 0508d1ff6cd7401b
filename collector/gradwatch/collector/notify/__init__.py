"""Telling somebody of an incident without Alertmanager: a signed webhook, once per incident."""
