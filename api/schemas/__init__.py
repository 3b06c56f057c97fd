"""Shapes of requests and answers: pydantic bodies, typed dictionaries, and their builders."""
