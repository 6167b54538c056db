"""Stage two: long filters become poles and residues, with a certificate of what that costs."""
