# A man page from what a program says to --help: usage, paragraphs, options (two blanks in front), examples (four).
#     tandem-worker --help | awk -v name=tandem-worker -v summary="..." -v version=0.1.0 -f help_to_man.awk
function roff(text) {
    gsub(/\\/, "\\e", text)
    gsub(/-/, "\\-", text)
    return text ~ /^[.']/ ? "\\&" text : text
}
function example(on) {
    if (on != in_example)
        print on ? ".PP\n.nf" : ".fi"
    in_example = on
}
NR == 1 {
    print ".TH " toupper(roff(name)) " 1 \"\" \"tandem " version "\" \"User Commands\""
    print ".SH NAME\n" roff(name) " \\- " roff(summary)
    sub(/^usage: */, "")
    print ".SH SYNOPSIS\n" roff($0) "\n.SH DESCRIPTION"
    next
}
/^$/ { example(0); print ".PP"; next }
/^  --/ {
    example(0)
    line = substr($0, 3)
    at = match(line, /  +/) # none: the option fills its column
    if (!at) {
        match(line, /^--[^ ]+ [^ ]+/)
        at = RLENGTH + 1
        RLENGTH = 0
    }
    left = substr(line, 1, at - 1)
    arg = ""
    if (blank = index(left, " ")) {
        arg = " \\fI" roff(substr(left, blank + 1)) "\\fR"
        left = substr(left, 1, blank - 1)
    }
    text = substr(line, at + RLENGTH)
    sub(/^ +/, "", text)
    print ".TP\n\\fB" roff(left) "\\fR" arg "\n" roff(text)
    next
}
/^          / { example(0); sub(/^ +/, ""); print roff($0); next } # goes on with an option
/^    / { example(1); print roff(substr($0, 5)); next }
{ example(0); print roff($0) }
END { example(0) }
