"""The config server: enrolment, discovery, policies, protection, watching; one REST API."""
