"""Models that are hosted on NDIF.

`host` has `Remote`: where a host is, whether it can do a job, and how patiently to wait; `argument` what `remote=` means;
`checks`, `backend` and `http` are its parts. What a job does is up to those who send it: nothing here reads or steers a model.
"""
