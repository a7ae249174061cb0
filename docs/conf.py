"Sphinx's settings for the site that tools/docs.py builds: stored outputs, nothing fetched, no notebook run."
project, author, copyright = 'self_distill', 'The self_distill developers', '2026 onwards, the self_distill developers'
extensions = ['myst_nb', 'sphinx.ext.mathjax', 'sphinx-mathjax-offline']  # the last brings MathJax with it
html_theme, html_title = 'furo', 'self_distill'
html_static_path, html_css_files = ['static'], ['site.css']
html_show_sourcelink = html_copy_source = False
pygments_style, pygments_dark_style = 'tango', 'monokai'

nb_execution_mode = 'off'
nb_output_stderr = 'remove'
nb_merge_streams = True
myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 4
suppress_warnings = ['myst.header', 'mystnb.unknown_mime_type', 'misc.highlighting_failure']
nb_ipywidgets_js = {}  # live widgets would come from a network
myst_dmath_double_inline = True  # $$…$$ within a paragraph
