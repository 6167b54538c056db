"""Stage one: the teacher's knowledge goes to the student; with it, the baseline it is compared with."""
